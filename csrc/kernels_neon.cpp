#define R2M_NAMESPACE neon
#define R2M_NEON_HALVES
#include "kernels.h"
