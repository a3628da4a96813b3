#include "bags.h"

namespace embedtrain {

namespace {

struct Terms {
    Bags bags;
    const float* zeros;
    bool per_value;
    int num_parts;
    GradientTerm* terms;
    Outside* outside;
};

void write_terms(const void* arguments, int part) {
    const Terms& t = *static_cast<const Terms*>(arguments);
    visit_bags(t.bags, part, t.num_parts, t.outside,
               [&t](const Feature& feature, Before before, int64_t bag, int64_t value, int64_t length) {
                   const float* row = feature.vectors ? feature.vectors + bag * feature.row_stride : t.zeros;
                   const float factor = feature.is_mean && length ? 1.0f / static_cast<float>(length) : 1.0f;
                   if (!t.per_value && has_term_per_bag(feature)) {
                       t.terms[before.terms + bag] = {row, factor};
                       return;
                   }
                   GradientTerm* terms = t.terms + (t.per_value ? before.values : before.terms);
                   for (int64_t v = value; v < value + length; ++v) {
                       terms[v] = {row, feature.weights ? feature.weights[v] * factor : factor};
                   }
               });
}

}  // namespace

const GradientTerm* find_terms(const Bags& bags, int64_t dim, bool per_value, int num_parts, Outside* outside) {
    int64_t total = 0;
    for (int64_t f = 0; f < bags.num_features; ++f) {
        total += per_value ? bags.features[f].num_values : num_terms(bags.features[f]);
    }
    float* zeros = static_cast<float*>(scratch(0, dim * 4));
    std::fill_n(zeros, dim, 0.0f);
    GradientTerm* terms = static_cast<GradientTerm*>(scratch(1, total * static_cast<int64_t>(sizeof(GradientTerm))));
    const Terms work{bags, zeros, per_value, num_parts, terms, outside};
    run_parts(num_parts, write_terms, &work);
    return terms;
}

}  // namespace embedtrain
