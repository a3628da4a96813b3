// Huge pages for memory whose rows are read at random. With small pages, each row also costs a walk of the page table.

#include <cerrno>
#include <cstdint>

#include "embedtrain.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

void embedtrain_advise_huge_pages(void* memory, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t page = 4096;
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(memory) + page - 1) / page * page;
    const uintptr_t end = (reinterpret_cast<uintptr_t>(memory) + static_cast<uintptr_t>(bytes)) / page * page;
    if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
    (void)memory;
    (void)bytes;
#endif
}

void embedtrain_collapse_pages(void* memory, int64_t bytes, int64_t* error) {
#ifdef __linux__
    constexpr int64_t page = 1 << 21;
    constexpr int collapse = 25;  // MADV_COLLAPSE of Linux 6.1, which older C libraries do not declare
    const volatile char* begin = static_cast<const char*>(memory);
    for (int64_t at = 0; at < bytes; at += page) begin[at];  // a page without memory cannot be collapsed
    *error = madvise(memory, static_cast<size_t>(bytes), collapse) == 0 ? 0 : errno;
    if (*error) madvise(memory, static_cast<size_t>(bytes), MADV_REMOVE);
#else
    (void)memory;
    (void)bytes;
    *error = ENOSYS;
#endif
}

void embedtrain_map_file(void* address, int64_t bytes, int file, int64_t* error) {
#ifdef __linux__
    void* mapped = mmap(address, static_cast<size_t>(bytes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0);
    *error = mapped == MAP_FAILED ? errno : 0;
#else
    (void)address;
    (void)bytes;
    (void)file;
    *error = ENOSYS;
#endif
}
