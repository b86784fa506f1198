// The table of functions that every variant fills.
#ifndef R2M_VARIANTS_H
#define R2M_VARIANTS_H

#include "r2m_native.h"

namespace r2m {

// A function of the ABI without its first two arguments, the variant and the compute type.
template <typename Function>
struct Inner;
template <typename... Arguments>
struct Inner<int32_t(int32_t, int32_t, Arguments...)> {
  using type = int32_t (*)(Arguments...);
};

// For float and double each.
struct Kernels {
#define R2M_MEMBER(NAME) Inner<decltype(r2m_##NAME)>::type NAME[2];
  R2M_OPERATORS(R2M_MEMBER)
#undef R2M_MEMBER
};

// R2M_X86 has it; see r2m_multiply_bfloat16.
int32_t multiply_bfloat16(int64_t depth, const r2m_matrix *left, const r2m_matrix *right, int64_t rows, int64_t columns,
                          const r2m_matrix *out);

namespace portable {
extern const Kernels KERNELS;
}
namespace avx2 {
extern const Kernels KERNELS;
}
namespace avx512 {
extern const Kernels KERNELS;
}
namespace neon {
extern const Kernels KERNELS;
}

}  // namespace r2m

#endif
