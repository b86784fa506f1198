"""The application around :mod:`r2m_kernels`: checkpoint files, the command ``r2m``, its demo."""
