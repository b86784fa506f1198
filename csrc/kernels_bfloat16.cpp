// Products of bfloat16 matrices whose sums stay float, for CPUs that multiply bfloat16: a library rounds what it sums.
//
// A tile of the result stays in registers over a run of the depth. Operands are packed so that two terms of a sum lie
// side by side, as the instruction takes them, and tiles follow each other. Every element is summed in the same order,
// wherever in a matrix it is.

#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>

#include "r2m_native.h"
#include "variants.h"

namespace r2m {
namespace {

constexpr int64_t LANES = 16;  // floats of a register, or pairs of terms
// 24 of 32 registers are sums: 12 rows of 2.
constexpr int64_t TILE_ROWS = 12, TILE_VECTORS = 2, TILE_COLUMNS = TILE_VECTORS * LANES;
// Pairs of terms that are packed at once: a tile's columns, 64 KiB, stay in the second-level cache for all rows.
constexpr int64_t PAIRS = 512;

#include "workspace.h"

__mmask32 first_of(int64_t count) { return count >= 32 ? 0xffffffffu : (1u << count) - 1u; }

// out[c] = (upper[c], lower[c]) for up to 32 columns, zeros beyond: two registers of pairs.
void interleave(const uint16_t *lower, const uint16_t *upper, int64_t count, __m512i out[2]) {
  static const uint16_t ORDER[2][32] = {{0, 32, 1, 33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39,
                                         8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47},
                                        {16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53, 22, 54, 23, 55,
                                         24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63}};
  const __mmask32 some = first_of(count);
  const __m512i low = _mm512_maskz_loadu_epi16(some, lower);
  const __m512i high = upper ? _mm512_maskz_loadu_epi16(some, upper) : _mm512_setzero_si512();
  for (int half = 0; half < 2; ++half)
    out[half] = _mm512_permutex2var_epi16(low, _mm512_loadu_si512(ORDER[half]), high);
}

// Terms `first` and the next one of `matrix`, whose rows are terms; the last of an odd number has a zero beside it.
void term_pair(const r2m_matrix &matrix, int64_t first, int64_t depth, const uint16_t *rows[2]) {
  rows[0] = (const uint16_t *)matrix.data + first * matrix.row_stride;
  rows[1] = first + 1 < depth ? rows[0] + matrix.row_stride : nullptr;
}

// Of the left matrix tile after tile: for each pair of terms its TILE_ROWS rows of the result.
void pack_rows(const r2m_matrix &left, int64_t first, int64_t pairs, int64_t depth, int64_t rows, uint32_t *out) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const uint16_t *terms[2];
    term_pair(left, first + 2 * pair, depth, terms);
    for (int64_t row = 0; row < rows; row += TILE_ROWS) {
      __m512i found[2];
      interleave(terms[0] + row, terms[1] ? terms[1] + row : nullptr, smaller(TILE_ROWS, rows - row), found);
      _mm512_mask_storeu_epi32(out + (row / TILE_ROWS * pairs + pair) * TILE_ROWS, (1u << TILE_ROWS) - 1u, found[0]);
    }
  }
}

// Of the right matrix one tile's columns.
void pack_columns(const r2m_matrix &right, int64_t first, int64_t pairs, int64_t depth, int64_t column, int64_t columns,
                  uint32_t *out) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const uint16_t *terms[2];
    term_pair(right, first + 2 * pair, depth, terms);
    __m512i found[2];
    interleave(terms[0] + column, terms[1] ? terms[1] + column : nullptr, columns, found);
    _mm512_store_si512(out + pair * TILE_COLUMNS, found[0]);
    _mm512_store_si512(out + pair * TILE_COLUMNS + LANES, found[1]);
  }
}

// Adds a run of the depth to a tile of the result, or starts it.
void multiply_tile(const uint32_t *left, const uint32_t *right, int64_t pairs, bool start, int64_t rows,
                   int64_t columns, float *out, int64_t stride) {
  __m512 sums[TILE_ROWS][TILE_VECTORS];
  __mmask16 inside[TILE_VECTORS];
  for (int64_t v = 0; v < TILE_VECTORS; ++v) inside[v] = (__mmask16)(first_of(columns) >> (v * LANES));
  for (int64_t row = 0; row < TILE_ROWS; ++row)
    for (int64_t v = 0; v < TILE_VECTORS; ++v)
      sums[row][v] =
          start || row >= rows ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(inside[v], out + row * stride + v * LANES);
  for (int64_t pair = 0; pair < pairs; ++pair, left += TILE_ROWS, right += TILE_COLUMNS) {
    __m512bh terms[TILE_VECTORS];
    for (int64_t v = 0; v < TILE_VECTORS; ++v) terms[v] = (__m512bh)_mm512_load_si512(right + v * LANES);
    for (int64_t row = 0; row < TILE_ROWS; ++row) {
      const __m512bh factor = (__m512bh)_mm512_set1_epi32((int)left[row]);
      for (int64_t v = 0; v < TILE_VECTORS; ++v) sums[row][v] = _mm512_dpbf16_ps(sums[row][v], terms[v], factor);
    }
  }
  for (int64_t row = 0; row < TILE_ROWS; ++row) {
    if (row >= rows) break;
    for (int64_t v = 0; v < TILE_VECTORS; ++v)
      _mm512_mask_storeu_ps(out + row * stride + v * LANES, inside[v], sums[row][v]);
  }
}

}  // namespace

int32_t multiply_bfloat16(int64_t depth, const r2m_matrix *left, const r2m_matrix *right, int64_t rows, int64_t columns,
                          const r2m_matrix *out) {
  const int64_t tiles = (rows + TILE_ROWS - 1) / TILE_ROWS, most = smaller(PAIRS, (depth + 1) / 2);
  constexpr int64_t PAIR = sizeof(uint32_t);
  Workspace lefts(tiles * most * TILE_ROWS * PAIR), rights(most * TILE_COLUMNS * PAIR);
  if (!lefts.memory || !rights.memory) return R2M_NO_MEMORY;
  uint32_t *of_rows = (uint32_t *)lefts.memory, *of_columns = (uint32_t *)rights.memory;
  int64_t first = 0;
  do {
    const int64_t pairs = smaller(most, (depth - first + 1) / 2);
    pack_rows(*left, first, pairs, depth, rows, of_rows);
    for (int64_t column = 0; column < columns; column += TILE_COLUMNS) {
      const int64_t width = smaller(TILE_COLUMNS, columns - column);
      pack_columns(*right, first, pairs, depth, column, width, of_columns);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        const int64_t row = tile * TILE_ROWS;
        multiply_tile(of_rows + row * pairs, of_columns, pairs, first == 0, smaller(TILE_ROWS, rows - row), width,
                      (float *)out->data + row * out->row_stride + column, out->row_stride);
      }
    }
    first += 2 * pairs;
  } while (first < depth);
  return R2M_OK;
}

}  // namespace r2m
