#include "gradients.h"

#include "rows.h"

namespace embedtrain {
namespace {

struct Sums {
    const EmbedtrainGradient& gradient;
    float factor;
    const GradientTerm* terms;
    int64_t begin, num_rows, dim;
    float* target;
};

EMBEDTRAIN_MULTIVERSION void sum_rows(const Sums* sums) {
    const EmbedtrainGradient& g = sums->gradient;
    for (int64_t i = 0; i < sums->num_rows; ++i) {
        sum_distinct_row(sums->terms, g.order, g.starts, sums->begin + i, g.num_values, sums->factor, sums->dim,
                         sums->target + i * sums->dim);
    }
}

// Returns how many indices and lengths of a gradient's terms are out of range.
int64_t num_outside_terms(const EmbedtrainGradient& g) {
    int64_t outside = Bags{g.features, g.num_features}.num_values() != g.num_values;
    outside += !all_inside(g.order, g.num_values, g.num_values);
    outside += g.starts[0] != 0 || g.starts[g.num_touched] != g.num_values;
    for (int64_t j = 0; j < g.num_touched; ++j) outside += g.starts[j] > g.starts[j + 1];
    return outside;
}

}  // namespace

RowGradients::RowGradients(const EmbedtrainGradient& gradient, float factor, const EmbedtrainDamping* damping,
                           int64_t dim, int num_parts)
    : gradient_(gradient), factor_(factor), damping_(damping), terms_(nullptr), dim_(dim),
      num_outside_(num_outside_tables(damping, gradient.num_touched)) {
    if (gradient.summed) return;
    num_outside_ += num_outside_terms(gradient);
    if (num_outside_) return;
    Outside outside{0};
    terms_ = find_terms({gradient.features, gradient.num_features}, dim, true, num_parts, &outside);
    num_outside_ = outside;
}

const float* RowGradients::of(int64_t begin, int64_t num_rows, float* memory) const {
    const float* grads = memory;
    if (gradient_.summed) {
        grads = gradient_.summed + begin * dim_;
        const int64_t last = std::min(begin + 2 * kRowsAtOnce, gradient_.num_touched) * dim_;
        // The next block is read when this one has been used.
        for (int64_t d = (begin + kRowsAtOnce) * dim_; d < last; d += 16) __builtin_prefetch(gradient_.summed + d);
    } else {
        const Sums sums{gradient_, factor_, terms_, begin, num_rows, dim_, memory};
        sum_rows(&sums);
    }
    if (!damping_) return grads;
    float* damped = memory + kRowsAtOnce * dim_;
    damp_rows(*damping_, grads, begin, num_rows, dim_, damped);
    return damped;
}

}  // namespace embedtrain
