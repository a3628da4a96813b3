#include "bounds.h"

#include "simd.h"

namespace embedtrain {

EMBEDTRAIN_MULTIVERSION int64_t num_outside_block(const int64_t* inputs, const int64_t* targets, const int64_t* starts,
                                                  const int64_t* stops, int64_t num_positions, int64_t num_targets,
                                                  int64_t num_rows) {
    const uint64_t bound = static_cast<uint64_t>(num_rows);  // as unsigned numbers, negative indices are large
    int64_t outside = 0;
    for (int64_t i = 0; i < num_positions; ++i) {
        outside += static_cast<uint64_t>(inputs[i]) >= bound;
        outside += starts[i] < 0 || starts[i] > i || stops[i] <= i || stops[i] > num_positions;
    }
    for (int64_t i = 0; i < num_positions * num_targets; ++i) outside += static_cast<uint64_t>(targets[i]) >= bound;
    return outside;
}

}  // namespace embedtrain
