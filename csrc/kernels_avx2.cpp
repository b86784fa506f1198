#define R2M_NAMESPACE avx2
#include "kernels.h"
