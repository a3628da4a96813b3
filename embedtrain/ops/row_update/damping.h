// Damps the gradients of rows along a few directions of high curvature; see damp_rows/types.py for the formula.

#pragma once

#include <cstdint>

#include "embedtrain.h"
#include "parallel.h"

namespace embedtrain {

// Number of gradients that are damped at once. They stay in the innermost cache until the update reads them.
constexpr int64_t kDampedAtOnce = 32;

// Returns the number of rows whose table is out of range; 0 without damping.
int64_t num_outside_tables(const EmbedtrainDamping* damping, int64_t num_rows);

// Returns the gradients of the given rows, at most kDampedAtOnce: damped into `memory`, or as they are if `damping` is
// null. grads: [num_rows, dim]; memory: [kDampedAtOnce, dim].
const float* damped_gradients(const EmbedtrainDamping* damping, const float* grads, int64_t num_rows, int64_t dim,
                              Range rows, float* memory);

}  // namespace embedtrain
