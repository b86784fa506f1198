/* The C ABI of the CPU kernels. Plain C types only: no exception, allocation or global crosses it.
 *
 * Every function is single-threaded and re-entrant: callers cut the work into ranges and run them on threads of their
 * own. Formulas and symbols are those of r2m_kernels/README.md: base θ0, experts θ_j, task vectors τ_j = θ_j − θ0,
 * residuals X_i = Σ_j weights[i][j] τ_j. Sums are formed in the compute type: double if `compute_double` is not 0, else
 * float. All functions but the first two return one of the R2M_* codes below.
 */
#ifndef R2M_NATIVE_H
#define R2M_NATIVE_H

#include <stdint.h>

/* Raised with every change of a signature, a struct or a meaning; the loader refuses any other number. */
#define R2M_ABI_VERSION 3

#define R2M_API __attribute__((visibility("default")))

#ifdef __cplusplus
extern "C" {
#endif

enum { R2M_OK = 0, R2M_NO_MEMORY = 1, R2M_BAD_ARGUMENT = 2, R2M_NO_VARIANT = 3 };
enum { R2M_FLOAT32 = 0, R2M_FLOAT64 = 1, R2M_BFLOAT16 = 2, R2M_FLOAT16 = 3 };
enum { R2M_PORTABLE = 0, R2M_AVX2 = 1, R2M_AVX512 = 2, R2M_NEON = 3 };

/* A matrix in memory: element (row, column) lies at data + (row * row_stride + column) elements. */
typedef struct {
  void *data;
  int64_t row_stride;
  int64_t dtype;
} r2m_matrix;

R2M_API int32_t r2m_abi_version(void);

/* Bit v is set if variant v was compiled in and this CPU runs it; bit 8 if the CPU multiplies bfloat16 in hardware. */
R2M_API int32_t r2m_capabilities(void);

/* gram[i][j] = Σ τ_i τ_j over columns [first, last) of one-row matrices: inputs[0] is the base, then `count` experts;
 * squares = Σ θ0².
 *
 * Float: products are summed in float over 8 terms a lane and in double from there, so that
 * |error| ≤ 10·2⁻²⁴ · Σ|τ_i τ_j|. NaN and Inf in an input reach the Gram. */
R2M_API int32_t r2m_task_gram(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                              int64_t first, int64_t last, double *gram, double *squares);

/* grams[i(i + 1)/2 + j][row] = Σ τ_i τ_j over each row, j ≤ i, as r2m_task_gram sums; squares = Σ θ0² over all.
 *
 * grams: of rows that are `stride` numbers apart. */
R2M_API int32_t r2m_row_grams(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                              int64_t rows, int64_t columns, double *grams, int64_t stride, double *squares);

/* out[row][j] = core_j + eta Σ_i M_ji W_i of that row, with W_i ∝ weights_i (scales_i (m_iᵀ G m_i)^½)^power, Σ W_i = 1,
 * from r2m_row_grams' G; where no residual has anything, W = weights. out: rows × count of the compute type; the rest
 * are doubles, mixing M count × count with m_i its columns. */
R2M_API int32_t r2m_row_coefficients(int32_t variant, int32_t compute_double, int64_t count, const double *grams,
                                     int64_t stride, int64_t rows, const double *core, const double *mixing,
                                     const double *weights, const double *scales, double eta, double power, void *out);

/* out[i][component][row] = left[i][component][row] W_i factors_i, each product rounded to the compute type, with the W
 * of r2m_row_coefficients from lengths[i][row] = ‖row of residual i‖, `stride` apart. left and out: `count` matrices of
 * rank × rows each, left of the compute type, out of that or bfloat16; the rest are doubles. */
R2M_API int32_t r2m_weigh_rows(int32_t variant, int32_t compute_double, int64_t count, const double *lengths,
                               int64_t stride, int64_t rows, const double *weights, const double *scales, double power,
                               const double *factors, int64_t rank, const r2m_matrix *left, const r2m_matrix *out);

/* out[i] = X_i[rows, columns], as float, bfloat16 (rounded to nearest, ties to even) or the compute type.
 *
 * weights: count × count of the compute type. out: `count` matrices whose first element is (first_row, first_column).
 */
R2M_API int32_t r2m_residual(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                             const void *weights, int64_t first_row, int64_t rows, int64_t first_column,
                             int64_t columns, const r2m_matrix *out);

/* A sparse sketch of every X_i and its energy, in one read of the inputs.
 *
 * S has 4 entries ±1 in each of its rows c: signs[t * long_side + c] in column (c mod width + offsets[c / width][t])
 * mod width, t = 0 … 3. With `along_rows` the long side is that of the rows: sketch[i] += SᵀX_i over the given rows,
 * (width × columns). Without, it is that of the columns: sketch[i][row] = X_i[row] S for the given rows, (rows ×
 * width). energy[i] += ‖X_i[rows]‖², in double. sketch, signs and weights are of the compute type. */
R2M_API int32_t r2m_sketch(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                           const void *weights, int64_t columns, int64_t first_row, int64_t last_row,
                           int32_t along_rows, int64_t width, int64_t long_side, const int32_t *offsets,
                           const void *signs, const r2m_matrix *sketch, double *energy);

/* out = θ0 + Σ_j coefficients[row][j] τ_j + low_rank, rounded once to the dtype of `out`, over rows × columns.
 *
 * coefficients: `count` numbers of the compute type for each row, `stride` apart; 0: the same for all rows. low_rank:
 * of the compute type, or NULL for none. largest: the largest magnitude before it is rounded; Inf or NaN where there is
 * one. `out` may be an input. */
R2M_API int32_t r2m_combine(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                            const void *coefficients, int64_t stride, int64_t rows, int64_t columns,
                            const r2m_matrix *low_rank, const r2m_matrix *out, double *largest);

/* Counts of magnitudes |τ_j| as float, by their bits: counts[j][upper 16 bits] += 1, or with `upper`, one number an
 * expert, counts[j][lower 16 bits] += 1 where the upper ones are those. Columns [first, last) of one-row matrices. */
enum { R2M_MAGNITUDES = 65536 };
R2M_API int32_t r2m_count_magnitudes(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                                     int64_t first, int64_t last, const int64_t *upper, int64_t *counts);

/* out = θ0 + scale · the weighted mean of the τ_j with |τ_j| ≥ thresholds[j] that agree in sign with their weighted
 * sum (TIES). Columns [first, last) of one-row matrices; weights of the compute type; largest as of r2m_combine. */
R2M_API int32_t r2m_combine_ties(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                                 const void *weights, const float *thresholds, double scale, int64_t first,
                                 int64_t last, const r2m_matrix *out, double *largest);

/* out = θ0 + scale · Σ_j weights_j τ_j / density over the τ_j that are kept (DARE): where the upper half of the 64 bits
 * of SplitMix64's hash of (keys[j], place + column) is below density · 2³². */
R2M_API int32_t r2m_combine_dare(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                                 const void *weights, const int64_t *keys, double scale, double density, int64_t place,
                                 int64_t first, int64_t last, const r2m_matrix *out, double *largest);

/* out = Σ_j weights[j] θ_j, summed in double: one-row matrices of `count` experts, without a base. */
R2M_API int32_t r2m_mean(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *experts,
                         const double *weights, int64_t first, int64_t last, const r2m_matrix *out, double *largest);

/* squares[j][column] = Σ over rows of τ_j²; squares[count] of merged − θ0, which is written over `merged`, of the
 * compute type. */
R2M_API int32_t r2m_column_squares(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                                   int64_t rows, int64_t columns, const r2m_matrix *merged, double *squares);

/* out = θ0 + factors[column] · change; factors and change of the compute type. */
R2M_API int32_t r2m_scale_columns(int32_t variant, int32_t compute_double, const r2m_matrix *base,
                                  const r2m_matrix *change, const void *factors, int64_t rows, int64_t columns,
                                  const r2m_matrix *out, double *largest);

/* out = Σ_j coefficients[j] τ_j in the compute type's precision; coefficients of that type. */
R2M_API int32_t r2m_weighted_sum(int32_t variant, int32_t compute_double, int64_t count, const r2m_matrix *inputs,
                                 const void *coefficients, int64_t rows, int64_t columns, const r2m_matrix *out);

/* out[row][column] = Σ_k left[k][row] right[k][column] over `depth` terms: bfloat16 operands, float sums and result.
 *
 * Only where bit 8 of r2m_capabilities is set, the same for every variant, and in float. Terms are added pair after
 * pair: a sum is the same whichever rows and columns are asked for. */
R2M_API int32_t r2m_multiply_bfloat16(int32_t variant, int32_t compute_double, int64_t depth, const r2m_matrix *left,
                                      const r2m_matrix *right, int64_t rows, int64_t columns, const r2m_matrix *out);

/* Every function above that a variant has its own code for, in float and in double. */
#define R2M_OPERATORS(EACH) \
  EACH(task_gram)           \
  EACH(row_grams)           \
  EACH(row_coefficients)    \
  EACH(weigh_rows)          \
  EACH(residual)            \
  EACH(sketch)              \
  EACH(combine)             \
  EACH(count_magnitudes)    \
  EACH(combine_ties) EACH(combine_dare) EACH(mean) EACH(column_squares) EACH(scale_columns) EACH(weighted_sum)

#ifdef __cplusplus
}
#endif

#endif
