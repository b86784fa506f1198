// The ABI: checks what a caller could get wrong and hands over to the variant asked for.

#include "r2m_native.h"

#include <stddef.h>

#include "variants.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace {

[[maybe_unused]] constexpr int32_t HAS_BFLOAT16_PRODUCTS = 1 << 8;
// Of experts: their pairs are counted and have bytes.
constexpr int64_t MOST_EXPERTS = int64_t{1} << 20;
// Of numbers that are counted together: their bytes, of the widest type and a chunk beyond, stay in int64.
constexpr int64_t MOST_NUMBERS = int64_t{1} << 58;

int32_t found_capabilities() {
  int32_t found = 1 << R2M_PORTABLE;
#if defined(R2M_X86)
  // The builtin asks the CPU and whether the operating system saves the registers.
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= 1 << R2M_AVX2;
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    found |= 1 << R2M_AVX512;
    unsigned eax, ebx, ecx, edx;
    if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1)) found |= HAS_BFLOAT16_PRODUCTS;
  }
#elif defined(R2M_ARM)
  found |= 1 << R2M_NEON;  // every 64-bit one has it
#endif
  return found;
}

// Asked once, when the library is loaded: in a virtual machine the CPU's answer takes microseconds.
const int32_t CAPABILITIES = found_capabilities();

const r2m::Kernels *kernels(int32_t variant) {
  if (variant < 0 || variant > R2M_NEON || !(CAPABILITIES >> variant & 1)) return nullptr;
#if defined(R2M_X86)
  if (variant == R2M_AVX2) return &r2m::avx2::KERNELS;
  if (variant == R2M_AVX512) return &r2m::avx512::KERNELS;
#elif defined(R2M_ARM)
  if (variant == R2M_NEON) return &r2m::neon::KERNELS;
#endif
  return &r2m::portable::KERNELS;
}

// Whether rows × columns numbers, `each` times as many, can be counted.
bool countable(int64_t rows, int64_t columns, int64_t each = 1) {
  int64_t found;
  return rows >= 0 && columns >= 0 && each >= 0 && columns <= MOST_NUMBERS && rows <= MOST_NUMBERS &&
         !__builtin_mul_overflow(rows, columns, &found) && !__builtin_mul_overflow(found, each, &found) &&
         found <= MOST_NUMBERS;
}

// Whether every element of rows [0, rows) and columns [0, columns) of a matrix has an offset, in either direction.
bool usable(const r2m_matrix &matrix, int64_t rows, int64_t columns) {
  const int64_t stride = matrix.row_stride;
  return matrix.data && matrix.dtype >= R2M_FLOAT32 && matrix.dtype <= R2M_FLOAT16 && stride >= -MOST_NUMBERS &&
         countable(rows, stride < 0 ? -stride : stride) && countable(1, columns);
}

bool usable(int64_t count, const r2m_matrix *matrices, int64_t rows, int64_t columns) {
  if (count < 1 || count > MOST_EXPERTS + 1 || !matrices) return false;
  for (int64_t index = 0; index < count; ++index)
    if (!usable(matrices[index], rows, columns)) return false;
  return true;
}

// The base and `count` experts.
bool usable_group(int64_t count, const r2m_matrix *inputs, int64_t rows, int64_t columns) {
  return count >= 1 && count <= MOST_EXPERTS && usable(count + 1, inputs, rows, columns);
}

// A run of columns of one row.
bool is_run(int64_t first, int64_t last) { return first >= 0 && last >= first && last <= MOST_NUMBERS; }

int64_t compute_dtype(int32_t compute_double) { return compute_double ? R2M_FLOAT64 : R2M_FLOAT32; }

}  // namespace

int32_t r2m_abi_version(void) { return R2M_ABI_VERSION; }

int32_t r2m_capabilities(void) { return CAPABILITIES; }

int32_t r2m_task_gram(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs, int64_t first,
                      int64_t last, double *gram, double *squares) {
  if (!is_run(first, last) || !usable_group(count, inputs, 1, last) || !gram || !squares) return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  return table ? table->task_gram[compute_double != 0](count, inputs, first, last, gram, squares) : R2M_NO_VARIANT;
}

int32_t r2m_row_grams(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs, int64_t rows,
                      int64_t columns, double *grams, int64_t stride, double *squares) {
  if (!usable_group(count, inputs, rows, columns) || !grams || stride < rows || !countable(count, count + 1, stride) ||
      !squares)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->row_grams[compute_double != 0](count, inputs, rows, columns, grams, stride, squares);
}

int32_t r2m_row_coefficients(int32_t variant, int32_t compute_double, int64_t count, const double *grams,
                             int64_t stride, int64_t rows, const double *core, const double *mixing,
                             const double *weights, const double *scales, double eta, double power, void *out) {
  if (count < 1 || count > MOST_EXPERTS || !grams || rows < 0 || stride < rows ||
      !countable(count, count + 1, stride) || !core || !mixing || !weights || !scales || !out)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->row_coefficients[compute_double != 0](count, grams, stride, rows, core, mixing, weights, scales, eta,
                                                      power, out);
}

int32_t r2m_weigh_rows(int32_t variant, int32_t compute_double, int64_t count, const double *lengths, int64_t stride,
                       int64_t rows, const double *weights, const double *scales, double power, const double *factors,
                       int64_t rank, const r2m_matrix *left, const r2m_matrix *out) {
  if (count < 1 || count > MOST_EXPERTS || !lengths || rows < 0 || stride < rows || !countable(count, stride) ||
      !weights || !scales || !factors || !usable(count, left, rank, rows) || !usable(count, out, rank, rows))
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->weigh_rows[compute_double != 0](count, lengths, stride, rows, weights, scales, power, factors, rank,
                                                left, out);
}

int32_t r2m_residual(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                     const void *weights, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns,
                     const r2m_matrix *out) {
  if (!countable(first_row, 1) || !countable(rows, 1) || !countable(first_column, 1) || !countable(columns, 1) ||
      !usable_group(count, inputs, first_row + rows, first_column + columns) || !usable(count, out, rows, columns) ||
      !weights)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->residual[compute_double != 0](count, inputs, weights, first_row, rows, first_column, columns, out);
}

int32_t r2m_sketch(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                   const void *weights, int64_t columns, int64_t first_row, int64_t last_row, int32_t along_rows,
                   int64_t width, int64_t long_side, const int32_t *offsets, const void *signs,
                   const r2m_matrix *sketch, double *energy) {
  if (!is_run(first_row, last_row) || !usable_group(count, inputs, last_row, columns) || width < 1 ||
      !countable(width, 2, count) || !countable(long_side, 4) || long_side < (along_rows ? last_row : columns) ||
      !usable(count, sketch, along_rows ? width : last_row, along_rows ? columns : width) || !weights || !offsets ||
      !signs || !energy)
    return R2M_BAD_ARGUMENT;
  for (int64_t i = 0; i < count; ++i)
    if (sketch[i].dtype != compute_dtype(compute_double)) return R2M_BAD_ARGUMENT;
  for (int64_t k = 0; k < (long_side + width - 1) / width * 4; ++k)
    if (offsets[k] < 0 || offsets[k] >= width) return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->sketch[compute_double != 0](count, inputs, weights, columns, first_row, last_row, along_rows, width,
                                            long_side, offsets, signs, sketch, energy);
}

int32_t r2m_combine(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                    const void *coefficients, int64_t stride, int64_t rows, int64_t columns, const r2m_matrix *low_rank,
                    const r2m_matrix *out, double *largest) {
  // Without experts the result is the base, in another dtype perhaps.
  if (count < 0 || count > MOST_EXPERTS || !usable(count + 1, inputs, rows, columns) || (count > 0 && !coefficients) ||
      !countable(rows, stride) ||
      (low_rank && (!usable(*low_rank, rows, columns) || low_rank->dtype != compute_dtype(compute_double))) ||
      !usable(1, out, rows, columns) || !largest)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->combine[compute_double != 0](count, inputs, coefficients, stride, rows, columns, low_rank, out,
                                             largest);
}

int32_t r2m_count_magnitudes(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                             int64_t first, int64_t last, const int64_t *upper, int64_t *counts) {
  if (!is_run(first, last) || !usable_group(count, inputs, 1, last) || !counts) return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->count_magnitudes[compute_double != 0](count, inputs, first, last, upper, counts);
}

int32_t r2m_combine_ties(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                         const void *weights, const float *thresholds, double scale, int64_t first, int64_t last,
                         const r2m_matrix *out, double *largest) {
  if (!is_run(first, last) || !usable_group(count, inputs, 1, last) || !weights || !thresholds ||
      !usable(1, out, 1, last) || !largest)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->combine_ties[compute_double != 0](count, inputs, weights, thresholds, scale, first, last, out, largest);
}

int32_t r2m_combine_dare(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                         const void *weights, const int64_t *keys, double scale, double density, int64_t place,
                         int64_t first, int64_t last, const r2m_matrix *out, double *largest) {
  if (!is_run(first, last) || !usable_group(count, inputs, 1, last) || !weights || !keys ||
      !(density > 0 && density <= 1) || !countable(place, 1) || !usable(1, out, 1, last) || !largest)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->combine_dare[compute_double != 0](count, inputs, weights, keys, scale, density, place, first, last, out,
                                                  largest);
}

int32_t r2m_mean(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *experts,
                 const double *weights, int64_t first, int64_t last, const r2m_matrix *out, double *largest) {
  if (!is_run(first, last) || !usable(count, experts, 1, last) || !weights || !usable(1, out, 1, last) || !largest)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->mean[compute_double != 0](count, experts, weights, first, last, out, largest);
}

int32_t r2m_column_squares(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                           int64_t rows, int64_t columns, const r2m_matrix *merged, double *squares) {
  if (!usable_group(count, inputs, rows, columns) || !countable(count + 1, columns) ||
      !usable(1, merged, rows, columns) || merged->dtype != compute_dtype(compute_double) || !squares)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->column_squares[compute_double != 0](count, inputs, rows, columns, merged, squares);
}

int32_t r2m_scale_columns(int32_t variant, int32_t compute_double, const r2m_matrix *base, const r2m_matrix *change,
                          const void *factors, int64_t rows, int64_t columns, const r2m_matrix *out, double *largest) {
  if (!usable(1, base, rows, columns) || !usable(1, change, rows, columns) ||
      change->dtype != compute_dtype(compute_double) || !factors || !usable(1, out, rows, columns) || !largest)
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->scale_columns[compute_double != 0](base, change, factors, rows, columns, out, largest);
}

int32_t r2m_weighted_sum(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                         const void *coefficients, int64_t rows, int64_t columns, const r2m_matrix *out) {
  if (!usable_group(count, inputs, rows, columns) || !coefficients || !usable(1, out, rows, columns))
    return R2M_BAD_ARGUMENT;
  const r2m::Kernels *table = kernels(variant);
  if (!table) return R2M_NO_VARIANT;
  return table->weighted_sum[compute_double != 0](count, inputs, coefficients, rows, columns, out);
}

int32_t r2m_multiply_bfloat16(int32_t variant, int32_t compute_double, int64_t depth, const r2m_matrix *left,
                              const r2m_matrix *right, int64_t rows, int64_t columns, const r2m_matrix *out) {
  // A block of rows is packed, of 2¹⁰ terms at most.
  if (!countable(depth, 1) || !countable(rows, 1 << 11) || !left || !right || !out || compute_double ||
      !usable(*left, depth, rows) || !usable(*right, depth, columns) || !usable(*out, rows, columns) ||
      left->dtype != R2M_BFLOAT16 || right->dtype != R2M_BFLOAT16 || out->dtype != R2M_FLOAT32)
    return R2M_BAD_ARGUMENT;
  if (!kernels(variant)) return R2M_NO_VARIANT;
#if defined(R2M_X86)
  if (CAPABILITIES & HAS_BFLOAT16_PRODUCTS) return r2m::multiply_bfloat16(depth, left, right, rows, columns, out);
#endif
  return R2M_NO_VARIANT;
}
