// The C ABI of the native library: every function that Python calls, and every struct that Python lays out.
//
// This is the only declaration. The kernels include it, and header.py parses it. So it may contain only functions that
// return void, and structs whose members are all floats or all 64 bits wide. Shapes in brackets describe the arrays
// that pointers point to. Python refuses to load a library that was built from other declarations.
//
// Every `num_outside` is an output: positive if an input index or length is out of range. Unless a comment says
// otherwise, all other outputs are meaningless then.

#pragma once

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// The bags of one feature.
struct EmbedtrainFeature {
    const int64_t* lengths;  // [num_bags]; null if every bag has one value
    const float* weights;    // [num_values]; null for no weights
    float* vectors;          // [num_bags, row_stride]: pooled vectors, in backward their gradients; null for zeros
    int64_t row_stride;
    int64_t num_bags;
    int64_t num_values;
    int64_t is_mean;
};

// Rows that are sent to one owner of rows, or received from it.
struct EmbedtrainPart {
    void* rows;  // [num_rows, dim]
    int64_t num_rows;
};

// Consecutive values whose rows lie in [first_row, first_row + num_rows). Later runs have larger rows.
struct EmbedtrainRun {
    int64_t num_values;
    int64_t first_row;
    int64_t num_rows;
};

// The ids of one feature and the parameters of its table.
struct EmbedtrainIds {
    const void* ids;
    int64_t is_int32;
    int64_t num_ids;
    uint64_t num_rows;
    uint64_t multiplier;
    uint64_t rows_per_rank;
    uint64_t first_row;
    uint64_t block_bits;  // 2^block_bits consecutive ids stay adjacent
    int64_t num_outside;  // output: number of ids that are not rows; their keys are meaningless
};

// The coefficients of an update by running moments; see RowStep and Moments in row_update/types.py.
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

// The gradients of the touched rows of an update. If `summed` is null, the update sums them: those of row j are the
// values order[starts[j] .. starts[j + 1]) of the features.
struct EmbedtrainGradient {
    const int64_t* rows;   // [num_touched]
    const float* summed;   // [num_touched, dim], or null
    const struct EmbedtrainFeature* features;  // [num_features], whose vectors are the gradients of the pooled vectors
    const int64_t* order;   // [num_values], from embedtrain_sort_unique
    const int64_t* starts;  // [num_touched + 1], from embedtrain_sort_unique
    int64_t num_touched;
    int64_t num_features;
    int64_t num_values;
};

// Damping of the gradients of rows; see Damping in damp_rows/types.py.
struct EmbedtrainDamping {
    const int64_t* tables;    // [num_touched]
    const float* times;       // [num_touched]
    const float* curvatures;  // [num_tables, num_directions]
    const float* directions;  // [num_tables, num_directions, dim]
    int64_t num_tables;
    int64_t num_directions;  // a positive multiple of 4
};

// Advises the kernel to use huge pages for all whole pages inside [memory, memory + bytes). It may have no effect, and
// it never changes the content of the memory.
void embedtrain_advise_huge_pages(void* memory, int64_t bytes);

// Allocates shared memory [memory, memory + bytes), which begins and ends at huge pages, in huge pages. Content may be
// lost. error: 0, or the error's number if there are none; then the memory is released.
void embedtrain_collapse_pages(void* memory, int64_t bytes, int64_t* error);

// Maps the first bytes of an open file at an address, in place of what is mapped there. Changes in memory are shared
// with all processes that map the file. error: 0, or the error's number.
void embedtrain_map_file(void* address, int64_t bytes, int file, int64_t* error);

// Counts the rows of each table by the bucket of their count. counts, tables: [num_rows]; histogram: [num_tables, 128],
// zeros on entry, output.
void embedtrain_count_buckets(const float* counts, const int64_t* tables, int64_t num_rows, int64_t num_tables,
                              int64_t* histogram, int64_t* num_outside);

// Chooses the rows of each table whose count is in the fewest upper buckets with `number` rows by the histogram. rows,
// counts, tables: [num_rows]; histogram: [num_tables, 128]; chosen_rows, chosen_counts: [num_rows], outputs, the chosen
// rows of the first table, then those of the second, and so on; num_chosen: [num_tables], output.
void embedtrain_busiest_rows(const int64_t* rows, const float* counts, const int64_t* tables, int64_t num_rows,
                             const int64_t* histogram, int64_t num_tables, int64_t number, int64_t* chosen_rows,
                             float* chosen_counts, int64_t* num_chosen, int64_t* num_outside);

// Finds the largest eigenvalues of symmetric matrices without negative eigenvalues, and their eigenvectors. matrices:
// [num_matrices, dim, dim]; values: [num_matrices, number], output; vectors: [num_matrices, number, dim], output.
void embedtrain_top_eigenpairs(const float* matrices, int64_t num_matrices, int64_t dim, int64_t number, float* values,
                               float* vectors);

// Copies rows. source: [num_source_rows, dim]; rows: [num_rows]; target: [num_rows, dim], output. Rows that are out of
// range are not copied.
void embedtrain_gather_rows(const void* source, int64_t num_source_rows, int source_is_bfloat16, const int64_t* rows,
                            int64_t num_rows, int64_t dim, void* target, int target_is_bfloat16, int num_threads,
                            int64_t* num_outside);

// Pools rows. source: [num_rows, dim] float32 or bfloat16; index: [num_values], ordered by feature; features:
// [num_features], whose vectors are the output.
void embedtrain_pool_rows(const void* source, int64_t num_rows, int is_bfloat16, int64_t dim, const int64_t* index,
                          int64_t num_values, const struct EmbedtrainFeature* features, int64_t num_features,
                          int num_threads, int64_t* num_outside);

// Sums the gradients of each distinct row. order: [num_values] and starts: [num_distinct + 1], from
// embedtrain_sort_unique; features: [num_features], whose vectors are the gradients of the pooled vectors; grad:
// [num_distinct, dim], output: the sums times `factor`.
void embedtrain_pool_rows_backward(int64_t dim, const int64_t* order, const int64_t* starts, int64_t num_distinct,
                                   int64_t num_values, const struct EmbedtrainFeature* features, int64_t num_features,
                                   float factor, float* grad, int num_threads, int64_t* num_outside);

// Splits bags by owner; see SplitBags in owner_bags/types.py. keys: [num_values], `owner * num_local_rows + local row`,
// ordered by feature and bag. Outputs: rows: [num_values], the local rows ordered by owner and bag, the first row of
// each bag at an owner as its complement; weights: [num_values] in the same order, or null; bag_of_sum: [num_values],
// the bag of each sum, ordered by owner and bag, and numbered consecutively over all features; id_counts and
// sum_counts: [num_owners].
void embedtrain_split_bags(const int64_t* keys, int64_t num_values, const struct EmbedtrainFeature* features,
                           int64_t num_features, int64_t num_owners, int64_t num_local_rows, int num_threads,
                           int rows_are_int32, void* rows, float* weights, int64_t* bag_of_sum, int64_t* id_counts,
                           int64_t* sum_counts, int64_t* num_outside);

// Restores split bags at an owner. split_rows: [num_values], the rows from embedtrain_split_bags. Outputs: rows:
// [num_values], without complements; lengths: [num_bags + 1], the lengths of the bags and one meaningless number.
// num_outside is positive if `split_rows` does not contain exactly `num_bags` bags.
void embedtrain_join_bags(const void* split_rows, int rows_are_int32, int64_t num_values, int64_t num_bags,
                          int64_t* rows, int64_t* lengths, int64_t* num_outside);

// Adds the owners' sums of each bag in order of owner, and divides a mean by the bag's length. parts: [num_owners], the
// sums in float32 or bfloat16; bag_of_sum: from embedtrain_split_bags; features: [num_features], whose vectors are the
// output. num_outside is positive if a bag is out of range or the bags of a part do not ascend.
void embedtrain_add_sums(const struct EmbedtrainPart* parts, int64_t num_owners, int is_bfloat16, int64_t dim,
                         const int64_t* bag_of_sum, const struct EmbedtrainFeature* features, int64_t num_features,
                         int num_threads, int64_t* num_outside);

// The backward of embedtrain_add_sums. features: [num_features], whose vectors are the gradients of the pooled vectors;
// parts: [num_owners], float32, output: the gradient of each sum. num_outside: as in embedtrain_add_sums.
void embedtrain_share_out(const struct EmbedtrainFeature* features, int64_t num_features, int64_t dim,
                          const int64_t* bag_of_sum, const struct EmbedtrainPart* parts, int64_t num_owners,
                          int num_threads, int64_t* num_outside);

// Finds largest magnitudes. features: [num_features], whose vectors are gradients. largest: [2], output: the largest
// magnitude of the gradients, and the largest of the weights' magnitudes and 1. Infinity or NaN if an input is.
void embedtrain_largest_magnitude(const struct EmbedtrainFeature* features, int64_t num_features, int64_t dim,
                                  float* largest);

// Sorts the terms of gradients by row. rows: [num_values], ordered by feature; runs: [num_runs], which cover all the
// values; words: [num_values], output: `row << term_bits | term`, which must fit into 64 bits.
void embedtrain_sort_terms(const int64_t* rows, int64_t num_values, const struct EmbedtrainFeature* features,
                           int64_t num_features, const struct EmbedtrainRun* runs, int64_t num_runs, int64_t num_rows,
                           int term_bits, int num_threads, uint64_t* words, int64_t* num_outside);

// Updates rows by row-wise Adagrad. factor: multiplies every sum that the update computes; damping: null for none;
// rounding_keys: [num_touched] for bfloat16 weights, null for float32; max_norm: infinity for no limit. num_outside:
// number of rows outside [0, num_rows), plus the number of damping tables and other indices out of range; if positive,
// nothing is updated.
void embedtrain_rowwise_adagrad(void* weight, float* accumulator, const struct EmbedtrainGradient* gradient,
                                float factor, const struct EmbedtrainDamping* damping, int64_t num_rows, int64_t dim,
                                float lr, float eps, float weight_decay, int decoupled, float max_norm,
                                const int64_t* rounding_keys, int num_threads, int64_t* num_outside);

// Sums gradients and updates float32 rows by row-wise Adagrad in one pass. words: [num_values], from
// embedtrain_sort_terms; features: [num_features], whose vectors are the gradients of the pooled vectors; factor:
// multiplies every sum. If num_outside is positive, nothing is updated.
void embedtrain_rowwise_adagrad_of_terms(float* weight, float* accumulator, int64_t dim, const uint64_t* words,
                                         int64_t num_values, int term_bits, const struct EmbedtrainFeature* features,
                                         int64_t num_features, float factor, float lr, float eps, float weight_decay,
                                         int decoupled, float max_norm, int num_threads, int64_t* num_outside);

// Updates rows by running moments. first: [num_rows, dim] or null; second: null, [num_rows] or [num_rows, dim] for a
// second_kind of 0, 1 or 2. factor, damping, rounding_keys and num_outside: as in embedtrain_rowwise_adagrad.
void embedtrain_moment_update(void* weight, float* first, float* second, const struct EmbedtrainGradient* gradient,
                              float factor, const struct EmbedtrainDamping* damping, const int64_t* rounding_keys,
                              int second_kind, int64_t num_rows, int64_t dim,
                              const struct EmbedtrainCoefficients* coefficients, int num_threads,
                              int64_t* num_outside);

// Sums weighted outer products of rows. source: [num_source_rows, dim] float32 or bfloat16; rows and weights:
// [num_rows], the weights not negative; result: [dim, dim], output. num_outside: number of rows outside
// [0, num_source_rows).
void embedtrain_weighted_square(const void* source, int64_t num_source_rows, int is_bfloat16, const int64_t* rows,
                                const float* weights, int64_t num_rows, int64_t dim, float* result, int num_threads,
                                int64_t* num_outside);

// Counts the skip-gram predictions of each row. inputs, starts, stops: [num_positions] and targets: [num_positions,
// num_targets], see TextBlock in skipgram_block/types.py; counts: [num_rows], output. num_outside: number of indices
// and windows that are out of range.
void embedtrain_count_rows(const int64_t* inputs, const int64_t* targets, const int64_t* starts, const int64_t* stops,
                           int64_t num_positions, int64_t num_targets, int64_t num_rows, float* counts,
                           int64_t* num_outside);

// See sample_text/__init__.py for the arguments. Outputs: words, targets, starts and stops, each with room for
// num_tokens words, and num_kept, the number of words that were written.
void embedtrain_sample_text(const int32_t* tokens, const int64_t* positions, const int32_t* parts, int64_t num_tokens,
                            const int32_t* keep, const uint64_t* columns, const int64_t* part_starts, int64_t window,
                            int64_t num_negatives, int64_t key, int64_t* words, int64_t* targets, int64_t* starts,
                            int64_t* stops, int64_t* num_kept);

// Computes the skip-gram loss and its gradient. vectors: [num_vectors, dim]; for the indices see TextBlock in
// skipgram_block/types.py; factor: multiplies loss and gradient. Outputs: loss: one double; grad: [num_vectors, dim].
// num_outside: number of indices and windows that are out of range; if positive, nothing is computed.
void embedtrain_skipgram_block(const float* vectors, int64_t num_vectors, int64_t dim, const int64_t* inputs,
                               const int64_t* targets, const int64_t* starts, const int64_t* stops,
                               int64_t num_positions, int64_t num_targets, float factor, double* loss, float* grad,
                               int64_t* num_outside);

// Sorts keys; see SortedKeys in sort_unique/types.py. keys: [num_keys], in [0, largest]; the bits of `largest` and of
// `num_keys` must fit into 64 together. Outputs: unique and starts: [num_keys + 1]; order and inverse: [num_keys] or
// null; num_distinct: number of distinct keys.
void embedtrain_sort_unique(const int64_t* keys, int64_t num_keys, int64_t largest, int num_threads, int64_t* unique,
                            int64_t* starts, int64_t* order, int64_t* inverse, int64_t* num_distinct,
                            int64_t* num_outside);

// Computes the order of keys that were sorted without it. inverse: [num_keys] and starts: [num_distinct + 1], from
// embedtrain_sort_unique; order: [num_keys], output. num_outside is positive if they do not belong together.
void embedtrain_order_of_inverse(const int64_t* inverse, int64_t num_keys, const int64_t* starts, int64_t num_distinct,
                                 int64_t* order, int64_t* num_outside);

// Maps ids to keys. features: [num_features], of tables with at most 2^31 rows; is_whole: whether one rank holds all
// rows; keys: output, one per id, ordered by feature.
void embedtrain_spread_keys(struct EmbedtrainIds* features, int64_t num_features, int64_t num_local_rows, int is_whole,
                            int64_t* keys);

// Publishes that this rank's part of exchange `number` is written.
void embedtrain_publish(void* own_region, int64_t number);

// Copies bytes that another process has written last or will read next. Their cache lines lie in another core's cache,
// so it takes long to get each, and the hardware does not prefetch across the small pages of shared memory.
void embedtrain_copy(const void* source, void* target, int64_t bytes);

// Waits until all ranks have published exchange `number`, for at most `patience_ms` per rank. regions: [num_regions];
// may_spin: whether this rank has a CPU core to itself; first_missing: output, the first region that has not published
// it, or num_regions.
void embedtrain_await(void* const* regions, int64_t num_regions, int64_t number, int64_t patience_ms, int may_spin,
                      int64_t* first_missing);

#ifdef __cplusplus
}
#endif
