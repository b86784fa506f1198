// The kernels, written once. A variant includes this file after `#define R2M_NAMESPACE …`, and is compiled for its own
// instructions; nothing here may be shared between variants by the linker, so all of it is static but the table.

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(R2M_NEON_HALVES)
#include <arm_neon.h>
#endif

#include "r2m_native.h"
#include "variants.h"

// Since 2.29 glibc has a pow that sets no errno for old programs' sake; with the former one a library built today runs
// on all systems that Python's packages are made for.
#if defined(__GLIBC__) && defined(__x86_64__)
__asm__(".symver pow, pow@GLIBC_2.2.5");
#elif defined(__GLIBC__) && defined(__aarch64__)
__asm__(".symver pow, pow@GLIBC_2.17");
#endif

#define R2M_RESTRICT __restrict__

namespace r2m {
namespace R2M_NAMESPACE {

#include "convert.h"

// Lanes of a vector register; products are summed a lane each.
#if defined(__AVX512F__)
template <typename T>
static constexpr int64_t LANES = 64 / sizeof(T);
#elif defined(__AVX2__)
template <typename T>
static constexpr int64_t LANES = 32 / sizeof(T);
#else
template <typename T>
static constexpr int64_t LANES = 16 / sizeof(T);
#endif

// Elements worked on at once: those of the base and of every expert stay in the first-level cache. Streams that are
// read longer at a time come slower: with 512 the Gram matrix of three float32 task vectors took twice as long.
static constexpr int64_t CHUNK = 128;
// Terms summed in the compute type before a sum goes on in double.
static constexpr int64_t TERMS = 8;
// Chunks whose sums in double are added up before they join the others.
static constexpr int64_t GROUP = 64;

#include "workspace.h"

// Begins to bring `count` elements from (row, column) on into the cache; they need not be in the matrix.
static inline void fetch(const r2m_matrix &matrix, int64_t row, int64_t column, int64_t count) {
  const char *first = address(matrix, row, column);
  for (int64_t byte = 0; byte < count * element_bytes(matrix.dtype); byte += Workspace::LINE)
    __builtin_prefetch(first + byte);
}

template <typename T>
static void subtract(const T *a, const T *b, int64_t count, T *R2M_RESTRICT out) {
  for (int64_t k = 0; k < count; ++k) out[k] = a[k] - b[k];
}

template <typename T>
static void add_multiple(T factor, const T *R2M_RESTRICT x, int64_t count, T *R2M_RESTRICT out) {
  for (int64_t k = 0; k < count; ++k) out[k] += factor * x[k];
}

// The task vectors τ_j of a chunk, a row of CHUNK numbers each, and θ0 itself. `taus` has room for count + 2 rows.
template <typename T>
static const T *task_vectors(int64_t count, const r2m_matrix *inputs, int64_t row, int64_t column, int64_t length,
                             T *taus) {
  T *scratch = taus + count * CHUNK;
  const T *base = read(inputs[0], row, column, length, scratch);
  for (int64_t j = 0; j < count; ++j) {
    const r2m_matrix &input = inputs[1 + j];
    if (sizeof(T) == sizeof(double) && input.dtype == R2M_FLOAT32) {  // widened in registers, which is twice as fast
      const float *R2M_RESTRICT expert = (const float *)address(input, row, column);
      T *R2M_RESTRICT tau = taus + j * CHUNK;
      for (int64_t k = 0; k < length; ++k) tau[k] = (T)expert[k] - base[k];
    } else {
      subtract(read(input, row, column, length, scratch + CHUNK), base, length, taus + j * CHUNK);
    }
  }
  return base;
}

// A register of numbers. Compilers do not see one in an array of LANES sums.
template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(sizeof(T) * LANES<T>)));
  static type load(const T *from) {
    type found;
    memcpy(&found, from, sizeof found);
    return found;
  }
  static void store(const type &value, T *to) { memcpy(to, &value, sizeof value); }
};

// X_i of a chunk. Sums stay in registers; beyond `length` the rows hold whatever they held, and so does `x`.
template <typename T>
static void mix(int64_t count, const T *weights, const T *R2M_RESTRICT taus, int64_t length, T *R2M_RESTRICT x) {
  constexpr int64_t L = LANES<T>, AT_ONCE = 4;
  static_assert(CHUNK % (AT_ONCE * L) == 0, "a chunk is whole groups of registers");
  for (int64_t k = 0; k < length; k += AT_ONCE * L) {
    typename Vector<T>::type sums[AT_ONCE];
    for (int64_t v = 0; v < AT_ONCE; ++v) sums[v] = weights[0] * Vector<T>::load(taus + k + v * L);
    for (int64_t j = 1; j < count; ++j)
      for (int64_t v = 0; v < AT_ONCE; ++v) sums[v] += weights[j] * Vector<T>::load(taus + j * CHUNK + k + v * L);
    for (int64_t v = 0; v < AT_ONCE; ++v) Vector<T>::store(sums[v], x + k + v * L);
  }
}

// Adds Σ τ_i τ_j over a chunk to `sums`, a lane each, for EXPERTS rows of `a` and as many of `b`: all pairs where they
// are the same rows (i ≥ j, in that order), else every pair. Rows are padded with zeros to whole steps. Each number is
// loaded once for all of its products: loads are what this would wait for.
template <typename T, int EXPERTS, bool SAME>
static void add_products(const T *a, const T *b, int64_t steps, double *R2M_RESTRICT sums) {
  constexpr int64_t L = LANES<T>;
  constexpr int PAIRS = SAME ? EXPERTS * (EXPERTS + 1) / 2 : EXPERTS * EXPERTS;
  typedef typename Vector<T>::type Register;
  double chunk[PAIRS][L] = {};
  for (int64_t step = 0; step < steps; ++step, a += TERMS * L, b += TERMS * L) {
    Register lanes[PAIRS] = {};
    for (int64_t term = 0; term < TERMS; ++term) {
      Register left[EXPERTS], right[EXPERTS];
      for (int i = 0; i < EXPERTS; ++i) left[i] = Vector<T>::load(a + i * CHUNK + term * L);
      for (int j = 0; j < EXPERTS; ++j) right[j] = SAME ? left[j] : Vector<T>::load(b + j * CHUNK + term * L);
      int pair = 0;
      for (int i = 0; i < EXPERTS; ++i)
        for (int j = 0; j < (SAME ? i + 1 : EXPERTS); ++j, ++pair) lanes[pair] += left[i] * right[j];
    }
    for (int pair = 0; pair < PAIRS; ++pair)
      for (int64_t l = 0; l < L; ++l) chunk[pair][l] += (double)lanes[pair][l];
  }
  for (int pair = 0; pair < PAIRS; ++pair)
    for (int64_t l = 0; l < L; ++l) sums[pair * L + l] += chunk[pair][l];
}

// The same for every pair i ≥ j of `count` rows.
template <typename T>
static void add_pairs(int64_t count, const T *tau, int64_t steps, double *sums) {
  if (count == 2) return add_products<T, 2, true>(tau, tau, steps, sums);
  if (count == 3) return add_products<T, 3, true>(tau, tau, steps, sums);
  if (count == 4) return add_products<T, 4, true>(tau, tau, steps, sums);
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j, sums += LANES<T>)
      add_products<T, 1, false>(tau + i * CHUNK, tau + j * CHUNK, steps, sums);
}

template <typename T>
static double energy_of(const T *x, int64_t length) {
  constexpr int64_t L = LANES<double>;
  double lanes[L] = {}, total = 0;
  int64_t k = 0;
  for (; k + L <= length; k += L)
    for (int64_t l = 0; l < L; ++l) lanes[l] += (double)x[k + l] * (double)x[k + l];
  for (; k < length; ++k) total += (double)x[k] * (double)x[k];
  for (int64_t l = 0; l < L; ++l) total += lanes[l];
  return total;
}

// Sums of products over a run of one row, in memory that a call gets once.
template <typename T>
struct GramSums {
  static constexpr int64_t L = LANES<T>, STEP = L * TERMS;
  static_assert(CHUNK % STEP == 0, "a chunk is whole steps");
  int64_t count, lanes;
  Workspace taus, sums;
  explicit GramSums(int64_t experts)
      : count(experts),
        lanes(experts * (experts + 1) / 2 * L),
        taus((experts + 2) * CHUNK * (int64_t)sizeof(T)),
        sums(2 * lanes * (int64_t)sizeof(double)) {}
  bool usable() const { return taus.memory && sums.memory; }

  // Of columns [first, last) of a row; returns Σ θ0². Afterwards `total(pair)` has what was summed.
  // A sum of n terms one after another is off by up to n roundings; of groups, by those of a group and of their number.
  double add_up(const r2m_matrix *inputs, int64_t row, int64_t first, int64_t last) {
    T *tau = (T *)taus.memory;
    double *group = (double *)sums.memory, *sum = group + lanes, squares = 0;
    memset(group, 0, (size_t)(2 * lanes) * sizeof(double));
    for (int64_t column = first; column < last; column += CHUNK) {
      const int64_t length = smaller(CHUNK, last - column), steps = (length + STEP - 1) / STEP;
      squares += energy_of(task_vectors(count, inputs, row, column, length, tau), length);
      for (int64_t j = 0; j < count; ++j)
        for (int64_t k = length; k < steps * STEP; ++k) tau[j * CHUNK + k] = 0;
      add_pairs(count, tau, steps, group);
      if ((column - first) / CHUNK % GROUP == GROUP - 1 || column + CHUNK >= last) {
        for (int64_t l = 0; l < lanes; ++l) sum[l] += group[l], group[l] = 0;
      }
    }
    return squares;
  }

  double total(int64_t pair) const {
    const double *sum = (const double *)sums.memory + lanes + pair * L;
    double total = 0;
    for (int64_t l = 0; l < L; ++l) total += sum[l];
    return total;
  }
};

template <typename T>
static int32_t task_gram(int64_t count, const r2m_matrix *inputs, int64_t first, int64_t last, double *gram,
                         double *squares) {
  GramSums<T> sums(count);
  if (!sums.usable()) return R2M_NO_MEMORY;
  *squares = sums.add_up(inputs, 0, first, last);
  int64_t pair = 0;
  for (int64_t i = 0; i < count; ++i)
    for (int64_t j = 0; j <= i; ++j) gram[i * count + j] = gram[j * count + i] = sums.total(pair++);
  return R2M_OK;
}

template <typename T>
static int32_t row_grams(int64_t count, const r2m_matrix *inputs, int64_t rows, int64_t columns, double *grams,
                         int64_t stride, double *squares) {
  GramSums<T> sums(count);
  if (!sums.usable()) return R2M_NO_MEMORY;
  *squares = 0;
  for (int64_t row = 0; row < rows; ++row) {
    *squares += sums.add_up(inputs, row, 0, columns);
    for (int64_t pair = 0; pair < count * (count + 1) / 2; ++pair) grams[pair * stride + row] = sums.total(pair);
  }
  return R2M_OK;
}

// Scaled lengths of one row become unnormalised shares w_i (s_i ‖row‖)^p; returns their sum. Relative to the longest,
// so that no power leaves double's range; where nobody has a residual all count.
static inline double to_shares(int64_t count, const double *weights, double power, double *share) {
  double longest = 0, sum = 0;
  for (int64_t i = 0; i < count; ++i)
    if (!(share[i] <= longest)) longest = share[i];
  for (int64_t i = 0; i < count; ++i) {
    share[i] = weights[i] * (longest > 0 || longest != longest ? pow(share[i] / longest, power) : 1.0);
    sum += share[i];
  }
  return sum;
}

// squares_i = m_iᵀ G_r m_i.
template <typename T>
static int32_t row_coefficients(int64_t count, const double *grams, int64_t stride, int64_t rows, const double *core,
                                const double *mixing, const double *weights, const double *scales, double eta,
                                double power, void *out) {
  Workspace memory((count * count + count) * (int64_t)sizeof(double));
  if (!memory.memory) return R2M_NO_MEMORY;
  double *gram = (double *)memory.memory, *share = gram + count * count;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0, pair = 0; i < count; ++i)
      for (int64_t j = 0; j <= i; ++j, ++pair) gram[i * count + j] = gram[j * count + i] = grams[pair * stride + row];
    for (int64_t i = 0; i < count; ++i) {
      double square = 0;
      for (int64_t j = 0; j < count; ++j) {
        double product = 0;
        for (int64_t k = 0; k < count; ++k) product += gram[j * count + k] * mixing[k * count + i];
        square += mixing[j * count + i] * product;
      }
      share[i] = scales[i] * sqrt(square > 0 ? square : square == square ? 0 : square);
    }
    const double sum = to_shares(count, weights, power, share);
    for (int64_t j = 0; j < count; ++j) {
      double mixed = 0;
      for (int64_t i = 0; i < count; ++i) mixed += mixing[j * count + i] * (share[i] / sum);
      ((T *)out)[row * count + j] = (T)(core[j] + eta * mixed);
    }
  }
  return R2M_OK;
}

template <typename T>
static int32_t weigh_rows(int64_t count, const double *lengths, int64_t stride, int64_t rows, const double *weights,
                          const double *scales, double power, const double *factors, int64_t rank,
                          const r2m_matrix *left, const r2m_matrix *out) {
  Workspace shares(count * (int64_t)sizeof(double)), of_rows(count * rows * (int64_t)sizeof(T)),
      chunks(2 * CHUNK * (int64_t)sizeof(T));
  if (!shares.memory || !of_rows.memory || !chunks.memory) return R2M_NO_MEMORY;
  double *share = (double *)shares.memory;
  T *all = (T *)of_rows.memory, *weighed = (T *)chunks.memory, *scratch = weighed + CHUNK;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < count; ++i) share[i] = scales[i] * lengths[i * stride + row];
    const double sum = to_shares(count, weights, power, share);
    for (int64_t i = 0; i < count; ++i) all[i * rows + row] = (T)(share[i] / sum);
  }
  for (int64_t i = 0; i < count; ++i) {
    const T factor = (T)factors[i];
    for (int64_t component = 0; component < rank; ++component)
      for (int64_t row = 0; row < rows; row += CHUNK) {
        const int64_t length = smaller(CHUNK, rows - row);
        const T *R2M_RESTRICT numbers = read(left[i], component, row, length, scratch);
        const T *R2M_RESTRICT of_row = all + i * rows + row;
        for (int64_t k = 0; k < length; ++k) weighed[k] = numbers[k] * of_row[k] * factor;
        write(weighed, out[i], component, row, length);
      }
  }
  return R2M_OK;
}

template <typename T>
static int32_t residual(int64_t count, const r2m_matrix *inputs, const void *weights, int64_t first_row, int64_t rows,
                        int64_t first_column, int64_t columns, const r2m_matrix *out) {
  Workspace taus((count + 3) * CHUNK * (int64_t)sizeof(T));
  if (!taus.memory) return R2M_NO_MEMORY;
  T *tau = (T *)taus.memory, *x = tau + (count + 2) * CHUNK;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t column = 0; column < columns; column += CHUNK) {
      const int64_t length = smaller(CHUNK, columns - column);
      task_vectors(count, inputs, first_row + row, first_column + column, length, tau);
      for (int64_t i = 0; i < count; ++i) {
        mix(count, (const T *)weights + i * count, tau, length, x);
        write(x, out[i], row, column, length);
      }
    }
  return R2M_OK;
}

// Rows of X go, with their signs, to four rows of the sketch each. Columns are the outer loop: a strip of all sketches
// stays in the second-level cache.
template <typename T>
static int32_t sketch_rows(int64_t count, const r2m_matrix *inputs, const T *weights, int64_t columns,
                           int64_t first_row, int64_t last_row, int64_t width, int64_t long_side,
                           const int32_t *offsets, const T *signs, const r2m_matrix *sketch, double *energy) {
  constexpr int64_t STRIP = CHUNK;
  Workspace taus((count + 3) * CHUNK * (int64_t)sizeof(T));
  if (!taus.memory) return R2M_NO_MEMORY;
  T *tau = (T *)taus.memory, *x = tau + (count + 2) * CHUNK;
  for (int64_t column = 0; column < columns; column += STRIP) {
    const int64_t length = smaller(STRIP, columns - column);
    for (int64_t row = first_row; row < last_row; ++row) {
      // Rows lie pages apart: no hardware fetches the next one's strip.
      for (int64_t j = 0; j <= count; ++j) fetch(inputs[j], row + 2, column, length);
      task_vectors(count, inputs, row, column, length, tau);
      for (int64_t i = 0; i < count; ++i) {
        mix(count, weights + i * count, tau, length, x);
        energy[i] += energy_of(x, length);
        for (int64_t t = 0; t < 4; ++t) {
          const int64_t bucket = (row % width + offsets[row / width * 4 + t]) % width;
          add_multiple(signs[t * long_side + row], x, length, (T *)address(sketch[i], bucket, column));
        }
      }
    }
  }
  return R2M_OK;
}

// A row of X, cut into pieces of `width`: each is added, with its signs, to the row of the sketch at four rotations.
// Twice the width is room for the rotations without a wrap; the halves are added at the end.
template <typename T>
static int32_t sketch_columns(int64_t count, const r2m_matrix *inputs, const T *weights, int64_t columns,
                              int64_t first_row, int64_t last_row, int64_t width, int64_t long_side,
                              const int32_t *offsets, const T *signs, const r2m_matrix *sketch, double *energy) {
  Workspace taus((count + 3) * CHUNK * (int64_t)sizeof(T)), sums(count * 2 * width * (int64_t)sizeof(T));
  if (!taus.memory || !sums.memory) return R2M_NO_MEMORY;
  T *tau = (T *)taus.memory, *x = tau + (count + 2) * CHUNK, *sum = (T *)sums.memory;
  for (int64_t row = first_row; row < last_row; ++row) {
    memset(sum, 0, (size_t)(count * 2 * width) * sizeof(T));
    for (int64_t column = 0; column < columns;) {
      const int64_t piece = column / width, within = column % width;
      const int64_t length = smaller(smaller(CHUNK, width - within), columns - column);
      task_vectors(count, inputs, row, column, length, tau);
      for (int64_t i = 0; i < count; ++i) {
        mix(count, weights + i * count, tau, length, x);
        energy[i] += energy_of(x, length);
        for (int64_t t = 0; t < 4; ++t) {
          T *R2M_RESTRICT target = sum + i * 2 * width + within + offsets[piece * 4 + t];
          const T *R2M_RESTRICT sign = signs + t * long_side + column;
          for (int64_t k = 0; k < length; ++k) target[k] += sign[k] * x[k];
        }
      }
      column += length;
    }
    for (int64_t i = 0; i < count; ++i) {
      T *out = (T *)address(sketch[i], row, 0);
      for (int64_t k = 0; k < width; ++k) out[k] = sum[i * 2 * width + k] + sum[i * 2 * width + width + k];
    }
  }
  return R2M_OK;
}

template <typename T>
static int32_t sketch(int64_t count, const r2m_matrix *inputs, const void *weights, int64_t columns, int64_t first_row,
                      int64_t last_row, int32_t along_rows, int64_t width, int64_t long_side, const int32_t *offsets,
                      const void *signs, const r2m_matrix *sketch, double *energy) {
  const auto kernel = along_rows ? sketch_rows<T> : sketch_columns<T>;
  return kernel(count, inputs, (const T *)weights, columns, first_row, last_row, width, long_side, offsets,
                (const T *)signs, sketch, energy);
}

#include "merged.h"
// In this order.
#include "elements.h"

#define R2M_ENTRY(NAME) {NAME<float>, NAME<double>},
const Kernels KERNELS = {R2M_OPERATORS(R2M_ENTRY)};
#undef R2M_ENTRY

}  // namespace R2M_NAMESPACE
}  // namespace r2m
