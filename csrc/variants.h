// The table of functions that every variant fills.
#ifndef R2M_VARIANTS_H
#define R2M_VARIANTS_H

#include "r2m_native.h"

namespace r2m {

// For float and double each; arguments are those of the ABI less the variant and the compute type.
struct Kernels {
  int32_t (*task_gram[2])(int64_t, const r2m_matrix *, int64_t, int64_t, double *);
  int32_t (*residual[2])(int64_t, const r2m_matrix *, const void *, int64_t, int64_t, int64_t, int64_t,
                         const r2m_matrix *);
  int32_t (*sketch[2])(int64_t, const r2m_matrix *, const void *, int64_t, int64_t, int64_t, int32_t, int64_t, int64_t,
                       const int32_t *, const void *, const r2m_matrix *, double *);
  int32_t (*combine[2])(int64_t, const r2m_matrix *, const void *, int64_t, int64_t, const r2m_matrix *,
                        const r2m_matrix *);
};

namespace portable {
extern const Kernels KERNELS;
}
namespace avx2 {
extern const Kernels KERNELS;
}
namespace avx512 {
extern const Kernels KERNELS;
}

}  // namespace r2m

#endif
