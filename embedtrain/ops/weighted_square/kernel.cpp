// Sums weighted outer products of rows with themselves, a block of rows that fits into the innermost cache at a time.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"
#include "simd.h"

namespace {

using namespace embedtrain;

constexpr int64_t kBlockBytes = 24 << 10;  // of packed rows
constexpr int64_t kHigh = 4;               // rows of the result per tile
constexpr int64_t kWide = 3;               // vectors per row of a tile; the tile's 12 sums fill most AVX2 registers

struct Square {
    const void* source;
    const int64_t* rows;
    const float* weights;
    int64_t num_rows, dim;
    float* result;
    int num_parts;
};

template <typename Stored>
EMBEDTRAIN_INLINE void pack(const Square& u, Range rows, int64_t width, float* packed) {
    const Stored* source = static_cast<const Stored*>(u.source);
    const int64_t row_bytes = u.dim * static_cast<int64_t>(sizeof(Stored));
    for (int64_t i = rows.begin; i < rows.end; ++i) {
        if (i + kPrefetchAhead < u.num_rows) prefetch_row<0>(source + u.rows[i + kPrefetchAhead] * u.dim, row_bytes);
        const Stored* row = source + u.rows[i] * u.dim;
        float* target = packed + (i - rows.begin) * width;
        const float factor = std::sqrt(u.weights[i]);
#pragma omp simd
        for (int64_t d = 0; d < u.dim; ++d) target[d] = factor * to_float(row[d]);
        for (int64_t d = u.dim; d < width; ++d) target[d] = 0.0f;
    }
}

// Adds the products of columns high, high + 1, ... with columns wide, wide + 1, ..., summed over all packed rows.
template <int64_t kVectors>
EMBEDTRAIN_INLINE void add_tile(const float* packed, int64_t num_rows, int64_t width, int64_t high, int64_t wide,
                                float* sums) {
    float8v tile[kHigh][kVectors];
    EMBEDTRAIN_UNROLL
    for (int64_t i = 0; i < kHigh; ++i) {
        EMBEDTRAIN_UNROLL
        for (int64_t j = 0; j < kVectors; ++j) load(tile[i][j], sums + (high + i) * width + wide + j * 8);
    }
    for (int64_t r = 0; r < num_rows; ++r) {
        const float* row = packed + r * width;
        float8v own[kVectors];
        EMBEDTRAIN_UNROLL
        for (int64_t j = 0; j < kVectors; ++j) load(own[j], row + wide + j * 8);
        EMBEDTRAIN_UNROLL
        for (int64_t i = 0; i < kHigh; ++i) {
            EMBEDTRAIN_UNROLL
            for (int64_t j = 0; j < kVectors; ++j) tile[i][j] += row[high + i] * own[j];
        }
    }
    EMBEDTRAIN_UNROLL
    for (int64_t i = 0; i < kHigh; ++i) {
        EMBEDTRAIN_UNROLL
        for (int64_t j = 0; j < kVectors; ++j) store(sums + (high + i) * width + wide + j * 8, tile[i][j]);
    }
}

// Computes the part's rows of the result, from the diagonal on. Each part reads all rows, so the result does not depend
// on the number of parts.
template <typename Stored>
EMBEDTRAIN_INLINE void square_part(const Square& u, int part) {
    const int64_t width = (u.dim + 7) / 8 * 8, num_strips = width / kHigh;
    const int64_t at_once = std::max<int64_t>(kBlockBytes / (width * 4), 8);
    float* packed = static_cast<float*>(scratch(0, (at_once + width) * width * 4));
    float* sums = packed + at_once * width;
    std::memset(sums, 0, static_cast<size_t>(width * width) * sizeof(float));
    for (int64_t begin = 0; begin < u.num_rows; begin += at_once) {
        const Range block{begin, std::min(begin + at_once, u.num_rows)};
        pack<Stored>(u, block, width, packed);
        // Parts take strips in turn, because the first strips are longer.
        for (int64_t strip = part; strip < num_strips; strip += u.num_parts) {
            const int64_t high = strip * kHigh;
            int64_t wide = high / 8 * 8;
            const int64_t size = block.end - block.begin;
            for (; wide + kWide * 8 <= width; wide += kWide * 8) add_tile<kWide>(packed, size, width, high, wide, sums);
            if (wide + 16 <= width) {
                add_tile<2>(packed, size, width, high, wide, sums);
            } else if (wide < width) {
                add_tile<1>(packed, size, width, high, wide, sums);
            }
        }
    }
    for (int64_t strip = part; strip < num_strips; strip += u.num_parts) {
        for (int64_t i = strip * kHigh; i < std::min((strip + 1) * kHigh, u.dim); ++i) {
            for (int64_t j = i; j < u.dim; ++j) u.result[i * u.dim + j] = u.result[j * u.dim + i] = sums[i * width + j];
        }
    }
}

EMBEDTRAIN_MULTIVERSION void square_float32(const void* square, int part) {
    square_part<float>(*static_cast<const Square*>(square), part);
}

EMBEDTRAIN_MULTIVERSION void square_bfloat16(const void* square, int part) {
    square_part<uint16_t>(*static_cast<const Square*>(square), part);
}

}  // namespace

void embedtrain_weighted_square(const void* source, int64_t num_source_rows, int is_bfloat16, const int64_t* rows,
                                const float* weights, int64_t num_rows, int64_t dim, float* result, int num_threads,
                                int64_t* num_outside) {
    *num_outside = count_outside(rows, num_rows, num_source_rows);
    if (*num_outside || dim == 0) return;
    const int num_parts = num_rows * dim < kSmallWork ? 1 : num_threads;
    const Square u{source, rows, weights, num_rows, dim, result, num_parts};
    run_parts(num_parts, is_bfloat16 ? square_bfloat16 : square_float32, &u);
}
