// Negative-sampling skip-gram over a block: loss and gradient on the block's distinct rows.
//
// Per centre, the logits of all its contexts against all its targets (the centre and its negatives) are one
// small matrix product, and the gradients are two more. Pairs of contexts are worked on together, so that each
// row loaded serves two products.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "simd.h"

namespace {

using namespace embedtrain;

constexpr int kTargetsAtOnce = 6;  // the centre and five negatives; more are done in further groups
// Beyond it exp would overflow, and the loss is the logit itself. The comparison below lets a NaN through.
constexpr float kLargestLogit = 80.0f;

// Dot products of two rows with `kTargets` others: out[c][t] = contexts[c] . targets[t].
template <int kContexts, int kTargets>
EMBEDTRAIN_INLINE void dot_products(const float* const* contexts, const float* const* targets, int64_t dim,
                                    float out[][kTargetsAtOnce]) {
    float16v wide[kContexts][kTargets] = {};
    int64_t d = 0;
    for (; d + 16 <= dim; d += 16) {
        float16v x[kContexts];
        for (int c = 0; c < kContexts; ++c) load(x[c], contexts[c] + d);
        for (int t = 0; t < kTargets; ++t) {
            float16v y;
            load(y, targets[t] + d);
            for (int c = 0; c < kContexts; ++c) wide[c][t] += x[c] * y;
        }
    }
    float4v narrow[kContexts][kTargets] = {};
    for (; d + 4 <= dim; d += 4) {
        float4v x[kContexts];
        for (int c = 0; c < kContexts; ++c) load(x[c], contexts[c] + d);
        for (int t = 0; t < kTargets; ++t) {
            float4v y;
            load(y, targets[t] + d);
            for (int c = 0; c < kContexts; ++c) narrow[c][t] += x[c] * y;
        }
    }
    for (int c = 0; c < kContexts; ++c) {
        for (int t = 0; t < kTargets; ++t) {
            float total = sum(wide[c][t]) + sum(narrow[c][t]);
            for (int64_t rest = d; rest < dim; ++rest) total += contexts[c][rest] * targets[t][rest];
            out[c][t] = total;
        }
    }
}

// sums[a] += sum over b of factor(a, b) * rows[b], for kSums rows at a time.
template <typename Vector, int kSums, typename Factor>
EMBEDTRAIN_INLINE int64_t add_combinations(float* const* sums, const float* const* rows, int num_rows,
                                           Factor factor, int64_t d, int64_t dim) {
    constexpr int64_t lanes = sizeof(Vector) / sizeof(float);
    for (; d + lanes <= dim; d += lanes) {
        Vector total[kSums];
        for (int a = 0; a < kSums; ++a) load(total[a], sums[a] + d);
        for (int b = 0; b < num_rows; ++b) {
            Vector row;
            load(row, rows[b] + d);
            for (int a = 0; a < kSums; ++a) total[a] += row * factor(a, b);
        }
        for (int a = 0; a < kSums; ++a) store(sums[a] + d, total[a]);
    }
    return d;
}

template <int kSums, typename Factor>
EMBEDTRAIN_INLINE void add_combinations(float* const* sums, const float* const* rows, int num_rows,
                                        Factor factor, int64_t dim) {
    int64_t d = add_combinations<float16v, kSums>(sums, rows, num_rows, factor, 0, dim);
    d = add_combinations<float4v, kSums>(sums, rows, num_rows, factor, d, dim);
    for (; d < dim; ++d) {
        for (int b = 0; b < num_rows; ++b) {
            for (int a = 0; a < kSums; ++a) sums[a][d] += rows[b][d] * factor(a, b);
        }
    }
}

// Replaces logits by slopes, sigmoid(logit) - label, and returns their loss; target 0 of a group of
// positives is the centre, whose label is 1.
EMBEDTRAIN_INLINE float slopes_in_place(float* logits, int64_t num_logits, bool first_is_positive) {
    float loss = 0.0f;
#pragma omp simd reduction(+ : loss)
    for (int64_t i = 0; i < num_logits; ++i) {
        const bool positive = first_is_positive && i % kTargetsAtOnce == 0;
        const float z = positive ? -logits[i] : logits[i];
        const float magnitude = z < 0 ? -z : z;
        const float decay = exponential(-(magnitude > kLargestLogit ? kLargestLogit : magnitude));
        const float probability = (z < 0 ? decay : 1.0f) / (1.0f + decay);
        loss += (z > 0 ? z : 0.0f) + log_one_plus(decay);
        logits[i] = positive ? -probability : probability;
    }
    return loss;
}

struct Window {
    std::vector<const float*> rows;
    std::vector<float*> grads;
    std::vector<float> slopes;  // [contexts][kTargetsAtOnce]
};

template <int kTargets>
EMBEDTRAIN_INLINE float add_targets(Window& window, const float* const* targets, float* const* target_grads,
                                    bool first_is_positive, int64_t dim) {
    const int num_contexts = static_cast<int>(window.rows.size());
    float(*slopes)[kTargetsAtOnce] = reinterpret_cast<float(*)[kTargetsAtOnce]>(window.slopes.data());
    // Slots past kTargets hold a logit whose loss and slope vanish, so that the loop below has no holes.
    if (kTargets < kTargetsAtOnce) std::fill_n(window.slopes.data(), num_contexts * kTargetsAtOnce, -1e30f);
    int c = 0;
    for (; c + 2 <= num_contexts; c += 2) dot_products<2, kTargets>(&window.rows[c], targets, dim, slopes + c);
    if (c < num_contexts) dot_products<1, kTargets>(&window.rows[c], targets, dim, slopes + c);
    const float loss = slopes_in_place(window.slopes.data(), num_contexts * kTargetsAtOnce, first_is_positive);

    for (c = 0; c + 2 <= num_contexts; c += 2) {
        add_combinations<2>(
            &window.grads[c], targets, kTargets, [=](int a, int t) { return slopes[c + a][t]; }, dim);
    }
    if (c < num_contexts) {
        add_combinations<1>(
            &window.grads[c], targets, kTargets, [=](int, int t) { return slopes[c][t]; }, dim);
    }
    int t = 0;
    for (; t + 2 <= kTargets; t += 2) {
        add_combinations<2>(
            target_grads + t, window.rows.data(), num_contexts, [=](int a, int b) { return slopes[b][t + a]; },
            dim);
    }
    if (t < kTargets) {
        add_combinations<1>(
            target_grads + t, window.rows.data(), num_contexts, [=](int, int b) { return slopes[b][t]; }, dim);
    }
    return loss;
}

EMBEDTRAIN_INLINE float add_group(Window& window, const float* const* targets, float* const* target_grads,
                                  int num_targets, bool first_is_positive, int64_t dim) {
    switch (num_targets) {
        case 1: return add_targets<1>(window, targets, target_grads, first_is_positive, dim);
        case 2: return add_targets<2>(window, targets, target_grads, first_is_positive, dim);
        case 3: return add_targets<3>(window, targets, target_grads, first_is_positive, dim);
        case 4: return add_targets<4>(window, targets, target_grads, first_is_positive, dim);
        case 5: return add_targets<5>(window, targets, target_grads, first_is_positive, dim);
        default: return add_targets<6>(window, targets, target_grads, first_is_positive, dim);
    }
}

}  // namespace

// vectors, grad: [num_vectors, dim], grad zeroed by the caller; the indices as TextBlock documents them;
// loss: one double. The caller has checked every index.
//
// A pair of rows that are the same one (a word twice in a window, or twice among the targets) must not be
// summed in registers at once: the second store would undo the first. The caller's pairs are split here.
extern "C" EMBEDTRAIN_MULTIVERSION void embedtrain_skipgram_block(
    const float* vectors, int64_t num_vectors, int64_t dim, const int64_t* inputs, const int64_t* outputs,
    const int64_t* negatives, const int64_t* starts, const int64_t* stops, int64_t num_positions,
    int64_t num_negatives, double* loss, float* grad) {
    (void)num_vectors;
    Window window;
    std::vector<int64_t> contexts, targets;
    std::vector<float> scratch;
    double total = 0.0;
    for (int64_t centre = 0; centre < num_positions; ++centre) {
        contexts.clear();
        for (int64_t p = starts[centre]; p < stops[centre]; ++p) {
            if (p != centre) contexts.push_back(inputs[p]);
        }
        if (contexts.empty()) continue;
        targets.assign(1, outputs[centre]);
        for (int64_t k = 0; k < num_negatives; ++k) {
            const int64_t negative = negatives[centre * num_negatives + k];
            if (negative >= 0) targets.push_back(negative);
        }
        // Gradients of this centre go to a scratch row each and from there home, one after the other.
        const size_t num_rows = contexts.size() + targets.size();
        scratch.assign(num_rows * dim, 0.0f);
        window.rows.clear();
        window.grads.clear();
        window.slopes.resize(contexts.size() * kTargetsAtOnce);
        for (size_t c = 0; c < contexts.size(); ++c) {
            window.rows.push_back(vectors + contexts[c] * dim);
            window.grads.push_back(scratch.data() + c * dim);
        }
        for (size_t first = 0; first < targets.size(); first += kTargetsAtOnce) {
            const int count = static_cast<int>(std::min<size_t>(kTargetsAtOnce, targets.size() - first));
            const float* rows[kTargetsAtOnce];
            float* grads[kTargetsAtOnce];
            for (int t = 0; t < count; ++t) {
                rows[t] = vectors + targets[first + t] * dim;
                grads[t] = scratch.data() + (contexts.size() + first + t) * dim;
            }
            total += add_group(window, rows, grads, count, first == 0, dim);
        }
        for (size_t r = 0; r < num_rows; ++r) {
            const int64_t home = r < contexts.size() ? contexts[r] : targets[r - contexts.size()];
            const float* source = scratch.data() + r * dim;
            float* target = grad + home * dim;
            for (int64_t d = 0; d < dim; ++d) target[d] += source[d];
        }
    }
    *loss = total;
}
