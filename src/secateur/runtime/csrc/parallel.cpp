#include "parallel.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace sct {
namespace {

struct Job {
    std::atomic<int64_t> next{0};
    int64_t items;
    void (*body)(void*, int64_t);
    void* context;

    void work() {
        for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, i);
    }
};

// Threads of our own, for where no OpenMP runtime is shared. One job at a time; a second caller works alone. Whoever
// comes too late is not waited for, so a forked child, which has no threads but its own, gets its work done, too.
class Pool {
  public:
    void run(Job& job, int helpers) {
        std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
        if (!turn.owns_lock()) return job.work();
        {
            std::lock_guard<std::mutex> hold(mutex_);
            for (; threads_ < helpers; threads_++) std::thread([this] { serve(); }).detach();
            job_ = &job;
            wanted_ = helpers;
        }
        wake_.notify_all();
        job.work();
        std::unique_lock<std::mutex> hold(mutex_);
        wanted_ = 0;  // who has not come yet need not
        done_.wait(hold, [this] { return busy_ == 0; });
    }

  private:
    void serve() {
        std::unique_lock<std::mutex> hold(mutex_);
        for (;;) {
            wake_.wait(hold, [this] { return wanted_ > 0; });
            wanted_--;
            busy_++;
            Job* job = job_;
            hold.unlock();
            job->work();
            hold.lock();
            if (--busy_ == 0) done_.notify_all();
        }
    }

    std::mutex turn_, mutex_;
    std::condition_variable wake_, done_;
    Job* job_ = nullptr;
    int threads_ = 0, wanted_ = 0, busy_ = 0;
};

std::atomic<void (*)(void (*)(void*), void*, unsigned, unsigned)> shared{nullptr};

}  // namespace

void parallel(int64_t items, int threads, void (*body)(void*, int64_t), void* context) {
    if (threads > items) threads = int(items);
    if (threads <= 1) {
        for (int64_t i = 0; i < items; i++) body(context, i);
        return;
    }
    Job job;
    job.items = items;
    job.body = body;
    job.context = context;
    if (auto team = shared.load()) {
        team([](void* self) { static_cast<Job*>(self)->work(); }, &job, unsigned(threads), 0);
    } else {
        static Pool* pool = new Pool;  // never destroyed: its threads may outlive everything else
        pool->run(job, threads - 1);
    }
}

}  // namespace sct

void sct_share_threads(void (*gomp_parallel)(void (*)(void*), void*, unsigned, unsigned)) {
    sct::shared = gomp_parallel;
}
