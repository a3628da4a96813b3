#include "parallel.h"

#include <unistd.h>

#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

namespace embedtrain {

namespace {

class Pool {
  public:
    void run(int num_parts, void (*work)(const void*, int), const void* arguments) {
        {
            std::lock_guard<std::mutex> lock(mutex_);
            while (num_workers_ < num_parts - 1) {
                // Detached, because the process may end while the threads wait for work.
                std::thread(&Pool::serve, this, ++num_workers_, generation_).detach();
            }
            work_ = work;
            arguments_ = arguments;
            num_parts_ = num_parts;
            num_running_ = num_parts - 1;
            ++generation_;
        }
        wake_.notify_all();
        work(arguments, 0);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return num_running_ == 0; });
    }

    std::mutex callers;  // held while a caller uses the pool

  private:
    void serve(int part, uint64_t seen) {
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            wake_.wait(lock, [&] { return generation_ != seen; });
            seen = generation_;
            if (part >= num_parts_) continue;
            const auto work = work_;
            const void* arguments = arguments_;
            lock.unlock();
            work(arguments, part);
            lock.lock();
            if (--num_running_ == 0) done_.notify_one();
        }
    }

    std::mutex mutex_;
    std::condition_variable wake_, done_;
    void (*work_)(const void*, int) = nullptr;
    const void* arguments_ = nullptr;
    int num_parts_ = 0, num_running_ = 0, num_workers_ = 0;
    uint64_t generation_ = 0;
};

// Threads do not survive a fork. So a child process creates its own pool and leaks the parent's object.
Pool* pool_of_process() {
    static std::mutex mutex;
    static Pool* pool = nullptr;
    static pid_t owner = 0;
    std::lock_guard<std::mutex> lock(mutex);
    if (owner != getpid()) {
        pool = new Pool();
        owner = getpid();
    }
    return pool;
}

struct Buffer {
    void* memory = nullptr;
    int64_t bytes = 0;
    ~Buffer() { std::free(memory); }
};

}  // namespace

void run_parts(int num_parts, void (*work)(const void*, int), const void* arguments) {
    if (num_parts > 1) {
        Pool* pool = pool_of_process();
        std::unique_lock<std::mutex> lock(pool->callers, std::try_to_lock);
        if (lock.owns_lock()) {
            pool->run(num_parts, work, arguments);
            return;
        }
    }
    for (int part = 0; part < num_parts; ++part) work(arguments, part);
}

void* scratch(int slot, int64_t bytes) {
    static thread_local Buffer buffers[4];
    Buffer& buffer = buffers[slot];
    if (buffer.bytes < bytes) {
        std::free(buffer.memory);
        buffer.bytes = bytes + bytes / 4;
        buffer.memory = std::aligned_alloc(64, (buffer.bytes + 63) / 64 * 64);
        if (buffer.memory == nullptr) throw std::bad_alloc();
    }
    return buffer.memory;
}

}  // namespace embedtrain
