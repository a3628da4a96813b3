// The C ABI of the native library: every function that Python calls, and every struct that it lays out.
//
// This is the only declaration. The kernels include it, and header.py reads it, so it holds nothing else: functions
// that return nothing, and structs whose members are all floats or all of 64 bits. Sizes in brackets are the shapes of
// what a pointer points to. A library that was built from another version of this file is refused when it is loaded.

#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// One feature's bags.
struct EmbedtrainFeature {
    const int64_t* lengths;  // [num_bags], or null: every bag holds one value
    const float* weights;    // [num_values], or null
    float* vectors;          // [num_bags, row_stride]: pooled vectors forward, their gradient backward; null: zeros
    int64_t row_stride;
    int64_t num_bags;
    int64_t num_values;
    int64_t is_mean;
};

// Rows that go to one owner of rows, or come from it.
struct EmbedtrainPart {
    void* rows;  // [num_rows, dim]
    int64_t num_rows;
};

// Consecutive values whose rows lie in [first_row, first_row + num_rows); rows of later runs are larger.
struct EmbedtrainRun {
    int64_t num_values;
    int64_t first_row;
    int64_t num_rows;
};

// Ids of one feature and the table that they are looked up in.
struct EmbedtrainIds {
    const void* ids;
    int64_t is_int32;
    int64_t num_ids;
    uint64_t num_rows;
    uint64_t multiplier;
    uint64_t rows_per_rank;
    uint64_t first_row;
    uint64_t block_bits;  // 2^block_bits ids stay side by side
    int64_t num_outside;  // written: how many ids are not rows; their keys mean nothing
};

// The numbers of a step of running moments; see RowStep and Moments in row_update/types.py.
struct EmbedtrainCoefficients {
    float step_size;
    float grad_factor;
    float max_row_grad_norm;
    float coupled_decay;
    float row_factor;
    float max_norm;
    float first_gain;
    float second_decay;
    float second_gain;
    float second_correction;
    float eps;
};

// Asks for large pages in the whole pages inside [memory, memory + bytes). This is advice: it may have no effect, and it
// never changes what the memory holds.
void embedtrain_advise_huge_pages(void* memory, int64_t bytes);

// source: [num_source_rows, dim]; rows: [num_rows]; target: [num_rows, dim]. num_outside: whether rows lie outside the
// source; those are not copied.
void embedtrain_gather_rows(const void* source, int64_t num_source_rows, int source_is_bfloat16, const int64_t* rows,
                            int64_t num_rows, int64_t dim, void* target, int target_is_bfloat16, int num_threads,
                            int64_t* num_outside);

// source: [num_rows, dim] float32 or bfloat16; index: [num_values], feature after feature; features: [num_features];
// their vectors are written. num_outside: whether indices lie outside the source or bags outside the values; the vectors
// mean nothing then.
void embedtrain_pool_rows(const void* source, int64_t num_rows, int is_bfloat16, int64_t dim, const int64_t* index,
                          int64_t num_values, const struct EmbedtrainFeature* features, int64_t num_features,
                          int num_threads, int64_t* num_outside);

// order: [num_values] and starts: [num_distinct + 1] as embedtrain_sort_unique gives them; features: as above, their
// vectors are read; grad: [num_distinct, dim], written: the sums times `factor`. num_outside: whether positions or bags
// lie outside the values; the sums mean nothing then.
void embedtrain_pool_rows_backward(int64_t dim, const int64_t* order, const int64_t* starts, int64_t num_distinct,
                                   int64_t num_values, const struct EmbedtrainFeature* features, int64_t num_features,
                                   float factor, float* grad, int num_threads, int64_t* num_outside);

// keys: [num_values], `owner * num_local_rows + local row`, of the features' bags; rows: [num_values], written: the local
// rows by owner, bag after bag, the first of each bag there as its complement; weights: [num_values], written alike, or
// null; bag_of_sum: [num_values], written: by owner the bags that have rows there, ascending; bags are numbered through
// all features; id_counts, sum_counts: [num_owners], written. num_outside: whether keys are of no owner, or bags lie
// outside the values; the rest means nothing then.
void embedtrain_split_bags(const int64_t* keys, int64_t num_values, const struct EmbedtrainFeature* features,
                           int64_t num_features, int64_t num_owners, int64_t num_local_rows, int num_threads,
                           int rows_are_int32, void* rows, float* weights, int64_t* bag_of_sum, int64_t* id_counts,
                           int64_t* sum_counts, int64_t* num_outside);

// split_rows: [num_values] as embedtrain_split_bags writes them; rows: [num_values], written: the rows themselves;
// lengths: [num_bags + 1], written: of the bags, and one number that means nothing. num_outside: whether there are more
// or fewer bags; the rest means nothing then.
void embedtrain_join_bags(const void* split_rows, int rows_are_int32, int64_t num_values, int64_t num_bags,
                          int64_t* rows, int64_t* lengths, int64_t* num_outside);

// parts: [num_owners], sums float32 or bfloat16; bag_of_sum: as embedtrain_split_bags gives it; features: their vectors
// are written: the sums of each bag in order of owner, divided by its length for a mean. num_outside: whether bags do
// not ascend in each part, or are of no feature; the vectors mean nothing then.
void embedtrain_add_sums(const struct EmbedtrainPart* parts, int64_t num_owners, int is_bfloat16, int64_t dim,
                         const int64_t* bag_of_sum, const struct EmbedtrainFeature* features, int64_t num_features,
                         int num_threads, int64_t* num_outside);

// features: their vectors are the gradients of the pooled vectors; parts: [num_owners], float32, written: the gradient of
// each sum. num_outside: as above.
void embedtrain_share_out(const struct EmbedtrainFeature* features, int64_t num_features, int64_t dim,
                          const int64_t* bag_of_sum, const struct EmbedtrainPart* parts, int64_t num_owners,
                          int num_threads, int64_t* num_outside);

// features: [num_features]; their vectors are the gradients of the pooled vectors. largest: [2], written: the largest
// magnitude of the gradients, and of the weights and 1; an infinity or a NaN if one is among them.
void embedtrain_largest_magnitude(const struct EmbedtrainFeature* features, int64_t num_features, int64_t dim,
                                  float* largest);

// rows: [num_values], feature after feature; runs: [num_runs], of all values; words: [num_values], written:
// `row << term_bits | term`, which must fit. num_outside: whether rows are not in [0, num_rows), or bags or runs lie
// outside the values; the words mean nothing then.
void embedtrain_sort_terms(const int64_t* rows, int64_t num_values, const struct EmbedtrainFeature* features,
                           int64_t num_features, const struct EmbedtrainRun* runs, int64_t num_runs, int64_t num_rows,
                           int term_bits, int num_threads, uint64_t* words, int64_t* num_outside);

// rounding_keys: [num_touched] for bfloat16 weights, null for float32. max_norm: infinity for none. num_outside: how many
// of the rows are not in [0, num_rows); if any, nothing is updated.
void embedtrain_rowwise_adagrad(void* weight, float* accumulator, const int64_t* rows, const float* row_grad,
                                int64_t num_touched, int64_t num_rows, int64_t dim, float lr, float eps,
                                float weight_decay, int decoupled, float max_norm, const int64_t* rounding_keys,
                                int num_threads, int64_t* num_outside);

// Updates float32 rows whose gradients are still to be summed. words: [num_values], as embedtrain_sort_terms gives them
// for the features, whose vectors are the gradients of the pooled vectors; factor: of every sum. num_outside: whether
// bags lie outside the values; nothing is updated then.
void embedtrain_rowwise_adagrad_of_terms(float* weight, float* accumulator, int64_t dim, const uint64_t* words,
                                         int64_t num_values, int term_bits, const struct EmbedtrainFeature* features,
                                         int64_t num_features, float factor, float lr, float eps, float weight_decay,
                                         int decoupled, float max_norm, int num_threads, int64_t* num_outside);

// first: [num_rows, dim] or null. second: null, [num_rows] or [num_rows, dim] for a second_kind of 0, 1 or 2.
// rounding_keys: [num_touched] for bfloat16 weights, null for float32. num_outside: how many of the rows are not in
// [0, num_rows); if any, nothing is updated.
void embedtrain_moment_update(void* weight, float* first, float* second, const int64_t* rows, const float* row_grad,
                              const int64_t* rounding_keys, int second_kind, int64_t num_touched, int64_t num_rows,
                              int64_t dim, const struct EmbedtrainCoefficients* coefficients, int num_threads,
                              int64_t* num_outside);

// inputs, starts, stops: [num_positions], targets: [num_positions, num_targets], as skipgram_block/types.py has them.
// counts: [num_rows], written. num_outside: how many indices lie outside the rows or the block; the counts mean nothing
// then.
void embedtrain_count_rows(const int64_t* inputs, const int64_t* targets, const int64_t* starts, const int64_t* stops,
                           int64_t num_positions, int64_t num_targets, int64_t num_rows, float* counts,
                           int64_t* num_outside);

// The arguments are those of damp_rows; damped: [num_rows, dim], written. num_outside: how many of the tables are not in
// [0, num_tables); if any, nothing is written.
void embedtrain_damp_rows(const float* grad, const int64_t* tables, const float* times, const float* curvatures,
                          const float* directions, int64_t num_rows, int64_t dim, int64_t num_tables,
                          int64_t num_directions, float* damped, int num_threads, int64_t* num_outside);

// The arguments are those of sample_text/types.py; words, targets, starts and stops have room for num_tokens words, and
// num_kept says how many were written.
void embedtrain_sample_text(const int32_t* tokens, const int64_t* positions, const int32_t* parts, int64_t num_tokens,
                            const int32_t* keep, const uint64_t* columns, const int64_t* part_starts, int64_t window,
                            int64_t num_negatives, int64_t key, int64_t* words, int64_t* targets, int64_t* starts,
                            int64_t* stops, int64_t* num_kept);

// vectors, grad: [num_vectors, dim]; the indices as TextBlock in skipgram_block/types.py documents them; factor: of the
// gradient; loss: one double. num_outside: how many indices and windows lie outside; if any, nothing is computed.
void embedtrain_skipgram_block(const float* vectors, int64_t num_vectors, int64_t dim, const int64_t* inputs,
                               const int64_t* targets, const int64_t* starts, const int64_t* stops,
                               int64_t num_positions, int64_t num_targets, float factor, double* loss, float* grad,
                               int64_t* num_outside);

// keys: [num_keys], from 0 to `largest`, which with the number of keys fits into 64 bits (the caller has checked that).
// unique: [num_keys + 1]; starts: [num_keys + 1]; order: [num_keys]; inverse: [num_keys] or null; num_distinct: how many
// of `unique` were written. num_outside: whether keys lie outside; the rest means nothing then.
void embedtrain_sort_unique(const int64_t* keys, int64_t num_keys, int64_t largest, int num_threads, int64_t* unique,
                            int64_t* starts, int64_t* order, int64_t* inverse, int64_t* num_distinct,
                            int64_t* num_outside);

// features: [num_features], of tables below 2^31 rows; is_whole: one rank holds every row; keys: the features' one
// after the other.
void embedtrain_spread_keys(struct EmbedtrainIds* features, int64_t num_features, int64_t num_local_rows, int is_whole,
                            int64_t* keys);

// Says that this rank's part of exchange `number` is written.
void embedtrain_publish(void* own_region, int64_t number);

// regions: [num_regions]; waits until all have published exchange `number`, `patience_ms` at most for each. may_spin:
// whether this rank has a core to itself. first_missing: the first region that is still missing, or num_regions.
void embedtrain_await(void* const* regions, int64_t num_regions, int64_t number, int64_t patience_ms, int may_spin,
                      int64_t* first_missing);

#ifdef __cplusplus
}
#endif
