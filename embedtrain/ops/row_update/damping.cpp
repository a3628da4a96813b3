// Damps gradients of rows. Two rows of a table share each load of a direction.

#include "damping.h"

#include <algorithm>

#include "rows.h"
#include "simd.h"

namespace embedtrain {
namespace {

constexpr int64_t kAtOnce = 4;  // directions per pass over a row
constexpr int64_t kPair = 2;    // rows

struct Block {
    const EmbedtrainDamping* damping;
    const float* grads;
    int64_t begin, num_rows, dim;
    float* damped;
};

// Replaces each x by (1 - exp(-x)) / x - 1. For small x the quotient would lose all digits, so the series replaces it.
// For x above 80 the exponential is far below the rounding error of 1. The compiler vectorises only loops without
// branches.
EMBEDTRAIN_INLINE void to_excesses(float* x) {
    constexpr int64_t kNum = kRowsAtOnce * kAtOnce;
    float powers[kNum], series[kNum], quotients[kNum];
#pragma omp simd
    for (int64_t k = 0; k < kNum; ++k) powers[k] = exponential(x[k] < 80.0f ? -x[k] : -80.0f);
#pragma omp simd
    for (int64_t k = 0; k < kNum; ++k) {
        series[k] = x[k] * (-1.0f / 2 + x[k] * (1.0f / 6 + x[k] * (-1.0f / 24 + x[k] * (1.0f / 120))));
        quotients[k] = (1.0f - powers[k]) / (x[k] < 0.125f ? 0.125f : x[k]) - 1.0f;
    }
#pragma omp simd
    for (int64_t k = 0; k < kNum; ++k) x[k] = x[k] < 0.125f ? series[k] : quotients[k];
}

template <typename Vector>
EMBEDTRAIN_INLINE void add_products(const float* const* grads, const float* vectors, int64_t dim, int64_t d,
                                    Vector (*sums)[kAtOnce]) {
    Vector own[kPair];
    EMBEDTRAIN_UNROLL
    for (int64_t r = 0; r < kPair; ++r) load(own[r], grads[r] + d);
    EMBEDTRAIN_UNROLL
    for (int64_t k = 0; k < kAtOnce; ++k) {
        Vector v;
        load(v, vectors + k * dim + d);
        EMBEDTRAIN_UNROLL
        for (int64_t r = 0; r < kPair; ++r) sums[r][k] += own[r] * v;
    }
}

template <typename Vector>
EMBEDTRAIN_INLINE void add_directions(const float (*factors)[kAtOnce], const float* vectors, int64_t dim, int64_t d,
                                      const float* const* sources, float* const* targets) {
    Vector sums[kPair];
    EMBEDTRAIN_UNROLL
    for (int64_t r = 0; r < kPair; ++r) load(sums[r], sources[r] + d);
    EMBEDTRAIN_UNROLL
    for (int64_t k = 0; k < kAtOnce; ++k) {
        Vector v;
        load(v, vectors + k * dim + d);
        EMBEDTRAIN_UNROLL
        for (int64_t r = 0; r < kPair; ++r) sums[r] += factors[r][k] * v;
    }
    EMBEDTRAIN_UNROLL
    for (int64_t r = 0; r < kPair; ++r) store(targets[r] + d, sums[r]);
}

// Writes `sources` plus the damping of `grads` to `targets`, for a pair of rows that may be the same row twice.
EMBEDTRAIN_INLINE void damp_pair(const float* const* grads, const float* vectors, const float* const* excesses,
                                 int64_t dim, const float* const* sources, float* const* targets) {
    const int64_t eights = dim - dim % 8, fours = dim - dim % 4;
    float8v wide[kPair][kAtOnce] = {};
    for (int64_t d = 0; d < eights; d += 8) add_products(grads, vectors, dim, d, wide);
    float4v halves[kPair][kAtOnce];
    EMBEDTRAIN_UNROLL
    for (int64_t r = 0; r < kPair; ++r) {
        EMBEDTRAIN_UNROLL
        for (int64_t k = 0; k < kAtOnce; ++k) {
            float4v parts[2];
            std::memcpy(parts, &wide[r][k], sizeof(parts));
            halves[r][k] = parts[0] + parts[1];
        }
    }
    if (eights < fours) add_products(grads, vectors, dim, eights, halves);
    float factors[kPair][kAtOnce];
    EMBEDTRAIN_UNROLL
    for (int64_t r = 0; r < kPair; ++r) {
        EMBEDTRAIN_UNROLL
        for (int64_t k = 0; k < kAtOnce; ++k) {
            float product = sum(halves[r][k]);
            for (int64_t d = fours; d < dim; ++d) product += grads[r][d] * vectors[k * dim + d];
            factors[r][k] = product * excesses[r][k];
        }
    }
    for (int64_t d = 0; d < eights; d += 8) add_directions<float8v>(factors, vectors, dim, d, sources, targets);
    if (eights < fours) add_directions<float4v>(factors, vectors, dim, eights, sources, targets);
    for (int64_t d = fours; d < dim; ++d) {
        float sums[kPair] = {sources[0][d], sources[1][d]};
        for (int64_t k = 0; k < kAtOnce; ++k) {
            for (int64_t r = 0; r < kPair; ++r) sums[r] += factors[r][k] * vectors[k * dim + d];
        }
        for (int64_t r = 0; r < kPair; ++r) targets[r][d] = sums[r];
    }
}

// Damps along kAtOnce directions from `direction` on.
EMBEDTRAIN_INLINE void damp_along(const Block& b, int64_t direction) {
    const EmbedtrainDamping& d = *b.damping;
    // Computes the exponentials of the whole block in one loop, because a row alone has too few to fill the pipeline.
    float excesses[kRowsAtOnce * kAtOnce] = {};
    const int64_t* tables = d.tables + b.begin;
    for (int64_t i = 0; i < b.num_rows; ++i) {
        const float* curvatures = d.curvatures + tables[i] * d.num_directions + direction;
        for (int64_t k = 0; k < kAtOnce; ++k) {
            excesses[i * kAtOnce + k] = d.times[b.begin + i] * std::max(curvatures[k], 0.0f);
        }
    }
    to_excesses(excesses);
    for (int64_t i = 0, next; i < b.num_rows; i = next + 1) {
        next = i + 1 < b.num_rows && tables[i + 1] == tables[i] ? i + 1 : i;
        const float* grads[kPair] = {b.grads + i * b.dim, b.grads + next * b.dim};
        const float* own[kPair] = {excesses + i * kAtOnce, excesses + next * kAtOnce};
        float* targets[kPair] = {b.damped + i * b.dim, b.damped + next * b.dim};
        const float* sources[kPair] = {direction ? targets[0] : grads[0], direction ? targets[1] : grads[1]};
        damp_pair(grads, d.directions + (tables[i] * d.num_directions + direction) * b.dim, own, b.dim, sources,
                  targets);
    }
}

EMBEDTRAIN_MULTIVERSION void damp_block(const Block* block) {
    for (int64_t direction = 0; direction < block->damping->num_directions; direction += kAtOnce) {
        damp_along(*block, direction);
    }
}

}  // namespace

int64_t num_outside_tables(const EmbedtrainDamping* damping, int64_t num_rows) {
    return damping ? count_outside(damping->tables, num_rows, damping->num_tables) : 0;
}

void damp_rows(const EmbedtrainDamping& damping, const float* grads, int64_t begin, int64_t num_rows, int64_t dim,
               float* damped) {
    const Block block{&damping, grads, begin, num_rows, dim, damped};
    damp_block(&block);
}

}  // namespace embedtrain
