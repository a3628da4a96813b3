// Counts the skip-gram predictions that each row takes part in.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "embedtrain.h"
#include "parallel.h"

void embedtrain_count_rows(const int64_t* inputs, const int64_t* targets, const int64_t* starts, const int64_t* stops,
                           int64_t num_positions, int64_t num_targets, int64_t num_rows, float* counts,
                           int64_t* num_outside) {
    using embedtrain::scratch;
    const int64_t n = num_positions;
    // Windows that begin minus windows that end, by position. The running sum is the number of windows around a word.
    int32_t* begun = static_cast<int32_t*>(scratch(0, (n + 1) * static_cast<int64_t>(sizeof(int32_t))));
    int64_t* totals = static_cast<int64_t*>(scratch(1, num_rows * static_cast<int64_t>(sizeof(int64_t))));
    std::memset(begun, 0, static_cast<size_t>(n + 1) * sizeof(int32_t));
    std::memset(totals, 0, static_cast<size_t>(num_rows) * sizeof(int64_t));
    int64_t outside = 0;
    for (int64_t i = 0; i < n; ++i) {
        if (starts[i] < 0 || stops[i] > n || starts[i] > i || stops[i] <= i) {
            ++outside;
            continue;
        }
        ++begun[starts[i]];
        --begun[stops[i]];
    }
    int64_t windows = 0;
    for (int64_t i = 0; i < n; ++i) {
        windows += begun[i];
        if (inputs[i] < 0 || inputs[i] >= num_rows) {
            ++outside;
            continue;
        }
        totals[inputs[i]] += (windows - 1) * num_targets;
        const int64_t contexts = stops[i] - starts[i] - 1;
        for (int64_t k = 0; k < num_targets; ++k) {
            const int64_t target = targets[i * num_targets + k];
            if (target < 0 || target >= num_rows) {
                ++outside;
                continue;
            }
            totals[target] += contexts;
        }
    }
    for (int64_t row = 0; row < num_rows; ++row) counts[row] = static_cast<float>(totals[row]);
    *num_outside = outside;
}
