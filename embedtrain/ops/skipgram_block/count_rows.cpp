// Counts the skip-gram predictions that each row takes part in.

#include <algorithm>
#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"

void embedtrain_count_rows(const int64_t* inputs, const int64_t* targets, const int64_t* starts, const int64_t* stops,
                           int64_t num_positions, int64_t num_targets, int64_t num_rows, float* counts,
                           int64_t* num_outside) {
    using namespace embedtrain;
    const int64_t n = num_positions;
    // Windows that begin minus windows that end, by position. The running sum is the number of windows around a word.
    int32_t* begun = static_cast<int32_t*>(scratch(0, (n + 1) * static_cast<int64_t>(sizeof(int32_t))));
    // The last element is for indices that are out of range.
    int64_t* totals = static_cast<int64_t*>(scratch(1, (num_rows + 1) * static_cast<int64_t>(sizeof(int64_t))));
    std::fill_n(begun, n + 1, 0);
    std::fill_n(totals, num_rows + 1, int64_t{0});
    const uint64_t bound = static_cast<uint64_t>(num_rows);  // as unsigned numbers, negative indices are large
    int64_t outside = 0;
    for (int64_t i = 0; i < n; ++i) {
        const bool is_inside = starts[i] >= 0 && starts[i] <= i && stops[i] > i && stops[i] <= n;
        outside += !is_inside;
        if (!is_inside) continue;
        ++begun[starts[i]];
        --begun[stops[i]];
    }
    int64_t windows = 0;
    for (int64_t i = 0; i < n; ++i) {
        windows += begun[i];
        prefetch_ahead(inputs, i);
        prefetch_ahead(starts, i);
        prefetch_ahead(stops, i);
        const uint64_t input = std::min(static_cast<uint64_t>(inputs[i]), bound);
        outside += input == bound;
        totals[input] += (windows - 1) * num_targets;
        const int64_t contexts = stops[i] - starts[i] - 1;
        for (int64_t k = 0; k < num_targets; ++k) {
            prefetch_ahead(targets, i * num_targets + k);
            const uint64_t target = std::min(static_cast<uint64_t>(targets[i * num_targets + k]), bound);
            outside += target == bound;
            totals[target] += contexts;
        }
    }
    for (int64_t row = 0; row < num_rows; ++row) counts[row] = static_cast<float>(totals[row]);
    *num_outside = outside;
}
