// Damps the gradients of rows along a few directions of high curvature; see damp_rows/types.py for the formula.

#pragma once

#include <cstdint>

#include "embedtrain.h"

namespace embedtrain {

// Number of gradients that are summed and damped at once. They stay in the innermost cache until they are used.
constexpr int64_t kRowsAtOnce = 32;

// Returns the number of rows whose table is out of range; 0 without damping.
int64_t num_outside_tables(const EmbedtrainDamping* damping, int64_t num_rows);

// Writes the damped gradients of rows [begin, begin + num_rows), at most kRowsAtOnce. grads and damped:
// [num_rows, dim].
void damp_rows(const EmbedtrainDamping& damping, const float* grads, int64_t begin, int64_t num_rows, int64_t dim,
               float* damped);

}  // namespace embedtrain
