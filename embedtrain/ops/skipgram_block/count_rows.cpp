// Counts the skip-gram predictions that each row takes part in.

#include <algorithm>
#include <cstdint>

#include "bounds.h"
#include "embedtrain.h"
#include "parallel.h"

void embedtrain_count_rows(const int64_t* inputs, const int64_t* targets, const int64_t* starts, const int64_t* stops,
                           int64_t num_positions, int64_t num_targets, int64_t num_rows, float* counts,
                           int64_t* num_outside) {
    using namespace embedtrain;
    const int64_t n = num_positions;
    *num_outside = num_outside_block(inputs, targets, starts, stops, n, num_targets, num_rows);
    if (*num_outside) return;
    // Windows that begin minus windows that end, by position. The running sum is the number of windows around a word.
    int32_t* begun = static_cast<int32_t*>(scratch(0, (n + 1) * static_cast<int64_t>(sizeof(int32_t))));
    int64_t* totals = static_cast<int64_t*>(scratch(1, num_rows * static_cast<int64_t>(sizeof(int64_t))));
    std::fill_n(begun, n + 1, 0);
    std::fill_n(totals, num_rows, int64_t{0});
    for (int64_t i = 0; i < n; ++i) {
        ++begun[starts[i]];
        --begun[stops[i]];
    }
    int64_t windows = 0;
    for (int64_t i = 0; i < n; ++i) {
        windows += begun[i];
        totals[inputs[i]] += (windows - 1) * num_targets;
        const int64_t contexts = stops[i] - starts[i] - 1;
        for (int64_t k = 0; k < num_targets; ++k) totals[targets[i * num_targets + k]] += contexts;
    }
    for (int64_t row = 0; row < num_rows; ++row) counts[row] = static_cast<float>(totals[row]);
}
