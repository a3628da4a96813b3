// Checks the indices and windows of a block of text before a kernel uses them.

#pragma once

#include <cstdint>

namespace embedtrain {

// Returns the number of indices and windows that are out of range; for the arguments see embedtrain_count_rows.
int64_t num_outside_block(const int64_t* inputs, const int64_t* targets, const int64_t* starts, const int64_t* stops,
                          int64_t num_positions, int64_t num_targets, int64_t num_rows);

}  // namespace embedtrain
