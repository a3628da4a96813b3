// Splits bags by the owners of their rows, and adds the owners' sums of bags.

#include <algorithm>
#include <cstdint>

#include "bags.h"
#include "divisor.h"
#include "embedtrain.h"

namespace {

using namespace embedtrain;

using Part = EmbedtrainPart;

// One part's values and sums for one owner: first their counts, then the positions of the next ones.
struct Place {
    int64_t value, sum;
    int64_t latest_bag;  // the last bag with a row of this owner
};

struct Split {
    const int64_t* keys;
    int64_t num_values;
    Bags bags;
    int64_t num_owners, num_local_rows;
    int num_parts;
    Place* places;  // [num_parts, num_owners]
    void* rows;
    float* weights;
    int64_t* bag_of_sum;
    Outside* outside;
};

Place* begin_part(const Split& s, int part) {
    Place* places = s.places + part * s.num_owners;
    for (int64_t owner = 0; owner < s.num_owners; ++owner) places[owner].latest_bag = -1;
    return places;
}

void check_keys(const void* split, int part) {
    const Split& s = *static_cast<const Split*>(split);
    const Range values = range_of_part(s.num_values, part, s.num_parts);
    const int64_t bound = s.num_owners * s.num_local_rows;
    if (!all_inside(s.keys + values.begin, values.end - values.begin, bound)) ++*s.outside;
}

void count_bags(const void* split, int part) {
    const Split& s = *static_cast<const Split*>(split);
    Place* places = begin_part(s, part);
    for (int64_t owner = 0; owner < s.num_owners; ++owner) places[owner].value = places[owner].sum = 0;
    const Divisor local(static_cast<uint64_t>(s.num_local_rows));
    const int64_t* all_keys = s.keys;
    visit_bags(s.bags, part, s.num_parts, s.outside,
               [=](const Feature&, Before before, int64_t bag, int64_t value, int64_t length) {
                   const int64_t* keys = all_keys + before.values + value;
                   const int64_t number = before.bags + bag;
                   for (int64_t v = 0; v < length; ++v) {
                       Place& place = places[local.quotient(static_cast<uint64_t>(keys[v]))];
                       ++place.value;
                       place.sum += place.latest_bag != number;
                       place.latest_bag = number;
                   }
               });
}

// Turns counts into positions, ordered by owner and then by part.
void add_up(const Split& s, int64_t* id_counts, int64_t* sum_counts) {
    int64_t value = 0, sum = 0;
    for (int64_t owner = 0; owner < s.num_owners; ++owner) {
        const int64_t first_value = value, first_sum = sum;
        for (int part = 0; part < s.num_parts; ++part) {
            Place& place = s.places[part * s.num_owners + owner];
            const Place counted = place;
            place.value = value;
            place.sum = sum;
            value += counted.value;
            sum += counted.sum;
        }
        id_counts[owner] = value - first_value;
        sum_counts[owner] = sum - first_sum;
    }
}

template <typename Row>
void write_bags(const void* split, int part) {
    const Split& s = *static_cast<const Split*>(split);
    Place* places = begin_part(s, part);
    const int64_t* all_keys = s.keys;
    Row* rows = static_cast<Row*>(s.rows);
    float* weights = s.weights;
    int64_t* bag_of_sum = s.bag_of_sum;
    const uint64_t num_local_rows = static_cast<uint64_t>(s.num_local_rows);
    const Divisor local(num_local_rows);
    visit_bags(s.bags, part, s.num_parts, s.outside,
               [=](const Feature& feature, Before before, int64_t bag, int64_t value, int64_t length) {
                   const int64_t* keys = all_keys + before.values + value;
                   const int64_t number = before.bags + bag;
                   for (int64_t v = 0; v < length; ++v) {
                       const uint64_t key = static_cast<uint64_t>(keys[v]), owner = local.quotient(key);
                       Place& place = places[owner];
                       const int64_t is_first = place.latest_bag != number;
                       place.latest_bag = number;
                       // Always written, without a branch, which would often be mispredicted. If the row is not the
                       // first of its bag, this writes the same number again.
                       bag_of_sum[(place.sum += is_first) - 1] = number;
                       const int64_t at = place.value++;
                       if (weights) weights[at] = feature.weights ? feature.weights[value + v] : 1.0f;
                       rows[at] = static_cast<Row>(static_cast<int64_t>(key - owner * num_local_rows) ^ -is_first);
                   }
               });
}

template <typename Row>
bool join(const Row* split_rows, int64_t num_values, int64_t num_bags, int64_t* rows, int64_t* starts) {
    int64_t bag = 0;
    for (int64_t i = 0; i < num_values; ++i) {
        const int64_t row = split_rows[i], sign = row >> 63;
        rows[i] = row ^ sign;
        starts[std::min(bag, num_bags)] = i;  // overwritten until the next bag begins
        bag -= sign;
    }
    return bag == num_bags && (num_values ? num_bags && split_rows[0] < 0 : !num_bags);
}

// The bags and the owners' sums of them.
struct Sums {
    const Part* parts;
    int64_t num_owners;
    const int64_t* bag_of_sum;  // ordered by owner
    Bags bags;
    int64_t dim;
    const float* zeros;
    int num_parts;
    Outside* outside;
    std::atomic<int64_t>* num_done;
};

EMBEDTRAIN_INLINE float factor_of(const Feature& feature, int64_t bag) {
    if (!feature.is_mean) return 1.0f;
    return feature.lengths ? 1.0f / static_cast<float>(std::max<int64_t>(feature.lengths[bag], 1)) : 1.0f;
}

// Calls visit(feature, bag in the feature, bag over all features) for the bags [range.begin, range.end).
template <typename Visit>
EMBEDTRAIN_INLINE void visit_range(const Bags& bags, Range range, Visit visit) {
    int64_t before = 0;
    for (int64_t f = 0; f < bags.num_features; ++f) {
        const Feature& feature = bags.features[f];
        const int64_t begin = std::clamp<int64_t>(range.begin - before, 0, feature.num_bags);
        const int64_t end = std::clamp<int64_t>(range.end - before, 0, feature.num_bags);
        for (int64_t bag = begin; bag < end; ++bag) visit(feature, bag, before + bag);
        before += feature.num_bags;
    }
}

int64_t num_bags(const Bags& bags) {
    int64_t total = 0;
    for (int64_t f = 0; f < bags.num_features; ++f) total += bags.features[f].num_bags;
    return total;
}

// The remaining sums of one owner.
struct Rest {
    const void* rows;
    const int64_t *bags, *end;
};

template <int kDim, typename Stored>
EMBEDTRAIN_INLINE void add(const Sums& s, int part) {
    const int64_t dim = kDim ? kDim : s.dim, num_owners = s.num_owners;
    const Range range = range_of_part(num_bags(s.bags), part, s.num_parts);
    void* memory = scratch(1, num_owners * static_cast<int64_t>(sizeof(Rest) + sizeof(Term<Stored>)));
    Rest* rests = static_cast<Rest*>(memory);
    Term<Stored>* terms = reinterpret_cast<Term<Stored>*>(rests + num_owners);
    const int64_t* first = s.bag_of_sum;
    for (int64_t owner = 0; owner < num_owners; ++owner) {
        const Part& own = s.parts[owner];
        const int64_t* end = first + own.num_rows;
        const int64_t* begin = std::lower_bound(first, end, range.begin);
        rests[owner] = {static_cast<const Stored*>(own.rows) + (begin - first) * dim, begin, end};
        first = end;
    }
    int64_t num_done = 0;
    visit_range(s.bags, range, [&](const Feature& feature, int64_t bag, int64_t number) __attribute__((always_inline)) {
        int64_t count = 0;
        const float factor = factor_of(feature, bag);
        for (int64_t owner = 0; owner < num_owners; ++owner) {
            Rest& rest = rests[owner];
            if (rest.bags == rest.end || *rest.bags != number) continue;
            const Stored* row = static_cast<const Stored*>(rest.rows);
            terms[count++] = {row, factor};
            rest.rows = row + dim;
            ++rest.bags;
        }
        num_done += count;
        sum_terms([=](int64_t i) __attribute__((always_inline)) { return terms[i]; }, count, 1.0f, dim,
                  feature.vectors + bag * feature.row_stride);
    });
    *s.num_done += num_done;
}

EMBEDTRAIN_MULTIVERSION void add_float32(const void* sums, int part) {
    const Sums& s = *static_cast<const Sums*>(sums);
    if (s.dim == 64) return add<64, float>(s, part);
    add<0, float>(s, part);
}

EMBEDTRAIN_MULTIVERSION void add_bfloat16(const void* sums, int part) {
    add<0, uint16_t>(*static_cast<const Sums*>(sums), part);
}

// Each part of the work handles a range of every owner's sums.
EMBEDTRAIN_MULTIVERSION void share_out(const void* sums, int part) {
    const Sums& s = *static_cast<const Sums*>(sums);
    const int64_t dim = s.dim;
    const int64_t* bag_of_sum = s.bag_of_sum;
    for (int64_t owner = 0; owner < s.num_owners; ++owner) {
        const Range range = range_of_part(s.parts[owner].num_rows, part, s.num_parts);
        float* target = static_cast<float*>(s.parts[owner].rows);
        int64_t i = range.begin, before = 0;
        for (int64_t f = 0; f < s.bags.num_features; ++f) {
            const Feature& feature = s.bags.features[f];
            for (; i < range.end && bag_of_sum[i] >= before && bag_of_sum[i] < before + feature.num_bags; ++i) {
                const int64_t bag = bag_of_sum[i] - before;
                const float* row = feature.vectors ? feature.vectors + bag * feature.row_stride : s.zeros;
                const Term<float> only{row, factor_of(feature, bag)};
                sum_terms([=](int64_t) __attribute__((always_inline)) { return only; }, 1, 1.0f, dim, target + i * dim);
            }
            before += feature.num_bags;
        }
        if (i != range.end) ++*s.outside;
        bag_of_sum += s.parts[owner].num_rows;
    }
}

int64_t num_sums(const Part* parts, int64_t num_owners) {
    int64_t total = 0;
    for (int64_t owner = 0; owner < num_owners; ++owner) total += parts[owner].num_rows;
    return total;
}

}  // namespace

void embedtrain_split_bags(const int64_t* keys, int64_t num_values, const EmbedtrainFeature* features,
                           int64_t num_features, int64_t num_owners, int64_t num_local_rows, int num_threads,
                           int rows_are_int32, void* rows, float* weights, int64_t* bag_of_sum, int64_t* id_counts,
                           int64_t* sum_counts, int64_t* num_outside) {
    const int num_parts = num_values < 32768 ? 1 : num_threads;
    const Bags bags{features, num_features};
    Outside outside{bags.num_values() != num_values};
    Place* places = static_cast<Place*>(scratch(0, num_parts * num_owners * static_cast<int64_t>(sizeof(Place))));
    const Split split{keys,  num_values, bags,    num_owners, num_local_rows, num_parts, places,
                      rows, weights,    bag_of_sum, &outside};
    if (!outside) run_parts(num_parts, check_keys, &split);
    if (!outside) run_parts(num_parts, count_bags, &split);
    if (!outside) {
        add_up(split, id_counts, sum_counts);
        run_parts(num_parts, rows_are_int32 ? write_bags<int32_t> : write_bags<int64_t>, &split);
    }
    *num_outside = outside;
}

void embedtrain_join_bags(const void* split_rows, int rows_are_int32, int64_t num_values, int64_t num_bags,
                          int64_t* rows, int64_t* lengths, int64_t* num_outside) {
    const bool is_right = rows_are_int32
                              ? join(static_cast<const int32_t*>(split_rows), num_values, num_bags, rows, lengths)
                              : join(static_cast<const int64_t*>(split_rows), num_values, num_bags, rows, lengths);
    *num_outside = !is_right;
    if (!is_right) return;
    lengths[num_bags] = num_values;
    for (int64_t bag = 0; bag < num_bags; ++bag) lengths[bag] = lengths[bag + 1] - lengths[bag];
}

void embedtrain_add_sums(const EmbedtrainPart* parts, int64_t num_owners, int is_bfloat16, int64_t dim,
                         const int64_t* bag_of_sum, const EmbedtrainFeature* features, int64_t num_features,
                         int num_threads, int64_t* num_outside) {
    const int64_t total = num_sums(parts, num_owners);
    const int num_parts = total * dim < kSmallWork ? 1 : num_threads;
    std::atomic<int64_t> num_done{0};
    const Sums s{parts, num_owners, bag_of_sum, {features, num_features}, dim, nullptr, num_parts, nullptr, &num_done};
    run_parts(num_parts, is_bfloat16 ? add_bfloat16 : add_float32, &s);
    *num_outside = num_done != total;
}

void embedtrain_share_out(const EmbedtrainFeature* features, int64_t num_features, int64_t dim,
                          const int64_t* bag_of_sum, const EmbedtrainPart* parts, int64_t num_owners,
                          int num_threads, int64_t* num_outside) {
    const int num_parts = num_sums(parts, num_owners) * dim < kSmallWork ? 1 : num_threads;
    float* zeros = static_cast<float*>(scratch(0, dim * 4));
    std::fill_n(zeros, dim, 0.0f);
    Outside outside{0};
    const Sums s{parts, num_owners, bag_of_sum, {features, num_features}, dim, zeros, num_parts, &outside, nullptr};
    run_parts(num_parts, share_out, &s);
    *num_outside = outside;
}
