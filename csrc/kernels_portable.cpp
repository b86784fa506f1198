#define R2M_NAMESPACE portable
#include "kernels.h"
