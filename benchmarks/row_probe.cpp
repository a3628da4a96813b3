// Bounds of a row update: what it takes to read and write the given rows, with prefetch, and nothing else.

#include <cstdint>

namespace {

// kReadsAll: also what an update cannot do without, a number of state for each row and the gradients.
template <bool kReadsAll>
void touch(float* table, float* state, const float* grad, const int64_t* rows, int64_t num_rows, int64_t dim) {
    const int64_t ahead = dim <= 64 ? 24 : 12;
    for (int64_t i = 0; i < num_rows; ++i) {
        if (i + ahead < num_rows) {
            const char* next = reinterpret_cast<const char*>(table + rows[i + ahead] * dim);
            for (int64_t at = 0; at < dim * 4; at += 64) __builtin_prefetch(next + at, 1);
            if (kReadsAll) __builtin_prefetch(state + rows[i + ahead], 1);
        }
        float* row = table + rows[i] * dim;
        for (int64_t d = 0; d < dim; ++d) row[d] += kReadsAll ? grad[i * dim + d] : 1.0f;
        if (kReadsAll) state[rows[i]] += 1.0f;
    }
}

}  // namespace

extern "C" void touch_rows(float* table, const int64_t* rows, int64_t num_rows, int64_t dim) {
    touch<false>(table, nullptr, nullptr, rows, num_rows, dim);
}

extern "C" void touch_all(float* table, float* state, const float* grad, const int64_t* rows, int64_t num_rows,
                          int64_t dim) {
    touch<true>(table, state, grad, rows, num_rows, dim);
}
