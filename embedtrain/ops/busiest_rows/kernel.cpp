// Chooses the rows with the largest counts by a histogram of the counts.

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "embedtrain.h"
#include "parallel.h"
#include "rows.h"

namespace {

using namespace embedtrain;

constexpr int64_t kNumBuckets = 128;

// The exponent of the count and two bits of its mantissa. Counts below 1 are in the first bucket.
EMBEDTRAIN_INLINE int64_t bucket_of(float count) {
    constexpr int32_t kOne = 127 * 4;
    int32_t bits;
    std::memcpy(&bits, &count, sizeof(bits));
    return std::clamp<int32_t>((bits >> 21) - kOne, 0, kNumBuckets - 1);
}

}  // namespace

void embedtrain_count_buckets(const float* counts, const int64_t* tables, int64_t num_rows, int64_t num_tables,
                              int64_t* histogram, int64_t* num_outside) {
    *num_outside = count_outside(tables, num_rows, num_tables);
    if (*num_outside) return;
    for (int64_t i = 0; i < num_rows; ++i) {
        prefetch_ahead(counts, i);
        ++histogram[tables[i] * kNumBuckets + bucket_of(counts[i])];
    }
}

void embedtrain_busiest_rows(const int64_t* rows, const float* counts, const int64_t* tables, int64_t num_rows,
                             const int64_t* histogram, int64_t num_tables, int64_t number, int64_t* chosen_rows,
                             float* chosen_counts, int64_t* num_chosen, int64_t* num_outside) {
    *num_outside = count_outside(tables, num_rows, num_tables);
    if (*num_outside) return;
    // Of each table: its lowest chosen bucket, and where its next chosen row goes.
    int64_t* lowest = static_cast<int64_t*>(scratch(0, 2 * num_tables * 8));
    int64_t* next = lowest + num_tables;
    for (int64_t table = 0; table < num_tables; ++table) {
        int64_t bucket = kNumBuckets, above = 0;
        while (bucket > 0 && above < number) above += histogram[table * kNumBuckets + --bucket];
        lowest[table] = std::min(bucket, kNumBuckets - 1);
        num_chosen[table] = 0;
    }
    for (int64_t i = 0; i < num_rows; ++i) num_chosen[tables[i]] += bucket_of(counts[i]) >= lowest[tables[i]];
    int64_t first = 0;
    for (int64_t table = 0; table < num_tables; ++table) {
        next[table] = first;
        first += num_chosen[table];
    }
    for (int64_t i = 0; i < num_rows; ++i) {
        if (bucket_of(counts[i]) < lowest[tables[i]]) continue;
        int64_t& place = next[tables[i]];
        chosen_rows[place] = rows[i];
        chosen_counts[place++] = counts[i];
    }
}
