// Sorts the terms of gradients by row, as 64-bit words `row << term_bits | term`, one per value.

#include <algorithm>
#include <cstdint>

#include "bags.h"
#include "embedtrain.h"
#include "radix_sort.h"

namespace {

using namespace embedtrain;

using Run = EmbedtrainRun;

struct Sorting {
    const int64_t* rows;
    int64_t num_values;
    Bags bags;
    const Run* runs;
    int64_t num_runs;
    int term_bits, num_parts;
    uint64_t *words, *spare;
    int64_t num_rows;
    Outside* outside;
};

// A separate vectorised pass, because the same check inside the next pass takes twice as long.
EMBEDTRAIN_MULTIVERSION void check_rows(const void* arguments, int part) {
    const Sorting& s = *static_cast<const Sorting*>(arguments);
    const Range values = range_of_part(s.num_values, part, s.num_parts);
    if (!all_inside(s.rows + values.begin, values.end - values.begin, s.num_rows)) ++*s.outside;
}

void pack(const void* arguments, int part) {
    const Sorting& s = *static_cast<const Sorting*>(arguments);
    visit_bags(s.bags, part, s.num_parts, s.outside,
               [&s](const Feature& feature, Before before, int64_t bag, int64_t value, int64_t length) {
                   const bool is_of_bag = has_term_per_bag(feature);
                   const uint64_t term = static_cast<uint64_t>(before.terms + (is_of_bag ? bag : value));
                   const int64_t* rows = s.rows + before.values + value;
                   uint64_t* words = s.words + before.values + value;
                   for (int64_t v = 0; v < length; ++v) {
                       const uint64_t own = is_of_bag ? term : term + static_cast<uint64_t>(v);
                       words[v] = static_cast<uint64_t>(rows[v]) << s.term_bits | own;
                   }
               });
}

void sort_run(const Sorting& s, const Run& run, int64_t begin, int num_parts) {
    uint64_t *words = s.words + begin, *spare = s.spare + begin;
    const uint64_t base = static_cast<uint64_t>(run.first_row) << s.term_bits;
    const int num_bits = bits_of(static_cast<uint64_t>(std::max<int64_t>(run.num_rows - 1, 0)));
    const uint64_t* sorted = radix_sort(words, spare, run.num_values, base, s.term_bits, num_bits, num_parts);
    if (sorted != words) std::copy_n(sorted, run.num_values, words);
}

// Sorts the runs that begin in a part's range of the values.
void sort_runs(const void* arguments, int part) {
    const Sorting& s = *static_cast<const Sorting*>(arguments);
    const Range range = range_of_part(s.num_values, part, s.num_parts);
    int64_t begin = 0;
    for (int64_t r = 0; r < s.num_runs; ++r) {
        if (begin >= range.begin && begin < range.end) sort_run(s, s.runs[r], begin, 1);
        begin += s.runs[r].num_values;
    }
}

}  // namespace

void embedtrain_sort_terms(const int64_t* rows, int64_t num_values, const EmbedtrainFeature* features,
                           int64_t num_features, const EmbedtrainRun* runs, int64_t num_runs, int64_t num_rows,
                           int term_bits, int num_threads, uint64_t* words, int64_t* num_outside) {
    const int num_parts = num_values < 32768 ? 1 : std::min(num_threads, kMaxSortParts);
    const Bags bags{features, num_features};
    int64_t num_in_runs = 0;
    for (int64_t r = 0; r < num_runs; ++r) num_in_runs += runs[r].num_values;
    int64_t total_terms = 0;
    for (int64_t f = 0; f < num_features; ++f) total_terms += num_terms(features[f]);
    const bool fits = bits_of(static_cast<uint64_t>(std::max<int64_t>(total_terms - 1, 0))) <= term_bits;
    Outside outside{bags.num_values() != num_values || num_in_runs != num_values || !fits};
    const Sorting sorting{rows,      num_values, bags,
                          runs, num_runs, term_bits, num_parts, words,
                          static_cast<uint64_t*>(scratch(1, num_values * 8)), num_rows, &outside};
    if (!outside) run_parts(num_parts, check_rows, &sorting);
    if (!outside) run_parts(num_parts, pack, &sorting);
    *num_outside = outside;
    if (*num_outside) return;
    if (num_runs >= 4 * num_parts) {
        run_parts(num_parts, sort_runs, &sorting);
        return;
    }
    int64_t begin = 0;
    for (int64_t r = 0; r < num_runs; ++r) {
        sort_run(sorting, sorting.runs[r], begin, num_parts);
        begin += sorting.runs[r].num_values;
    }
}
