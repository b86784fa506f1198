#define R2M_NAMESPACE avx512
#include "kernels.h"
