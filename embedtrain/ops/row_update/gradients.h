// The gradients of the rows that an update touches. The update takes them a block at a time, so that sums of duplicates
// and damped gradients are never stored in memory.

#pragma once

#include <cstdint>

#include "bags.h"
#include "damping.h"
#include "embedtrain.h"

namespace embedtrain {

class RowGradients {
  public:
    // factor: multiplies every sum, but not the gradients that are summed already. damping: null for none. dim:
    // dimension of a row. Uses slots 0 and 1 of the calling thread's scratch memory.
    RowGradients(const EmbedtrainGradient& gradient, float factor, const EmbedtrainDamping* damping, int64_t dim,
                 int num_parts);

    // Returns how many indices are out of range. If positive, `of` must not be called.
    int64_t num_outside() const { return num_outside_; }

    // Returns the gradients of rows [begin, begin + num_rows), at most kRowsAtOnce. memory: [kMemoryRows, dim]; the
    // result may lie in it.
    const float* of(int64_t begin, int64_t num_rows, float* memory) const;

    static constexpr int64_t kMemoryRows = 2 * kRowsAtOnce;

  private:
    const EmbedtrainGradient& gradient_;
    float factor_;
    const EmbedtrainDamping* damping_;
    const GradientTerm* terms_;
    int64_t dim_, num_outside_;
};

}  // namespace embedtrain
