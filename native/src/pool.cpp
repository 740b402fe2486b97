#include "pool.h"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

#ifdef _WIN32
#include <process.h>
#define PRUNUS_GETPID _getpid
#else
#include <unistd.h>
#define PRUNUS_GETPID getpid
#endif

namespace prunus {
namespace {

constexpr auto kSpin = std::chrono::microseconds(4);

struct Job {
  Part part;
  void* context;
  int parts;
  std::atomic<int> next{0};
  std::atomic<bool> ok{true};

  void work() {
    for (int i = next.fetch_add(1); i < parts; i = next.fetch_add(1))
      if (!part(context, i)) ok.store(false);
  }
};

class Pool {
 public:
  explicit Pool(long owner) : owner(owner) {}

  bool run(Job& job) {
    {
      std::lock_guard<std::mutex> lock(state_);
      grow(job.parts - 1);
      job_ = &job;
      generation_.fetch_add(1);
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(state_);
    job_ = nullptr;  // a thread that wakes up late finds nothing to do
    if (active_.load() != 0) {
      lock.unlock();
      spin_until([this] { return active_.load() == 0; });
      lock.lock();
      done_.wait(lock, [this] { return active_.load() == 0; });
    }
    return job.ok.load();
  }

  const long owner;
  std::mutex busy;

 private:
  template <class Condition>
  static void spin_until(Condition condition) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    while (!condition() && std::chrono::steady_clock::now() < end) {
    }
  }

  void grow(int wanted) {
    try {
      for (; threads_ < wanted; ++threads_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {
      // The system gives no more threads: those that exist share the work.
    }
  }

  void serve() {
    unsigned seen = 0;
    std::unique_lock<std::mutex> lock(state_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_.load() != seen; });
      seen = generation_.load();
      Job* job = job_;
      if (job != nullptr) {
        active_.fetch_add(1);
        lock.unlock();
        job->work();
        lock.lock();
        if (active_.fetch_sub(1) == 1) done_.notify_one();
      }
      lock.unlock();
      spin_until([&] { return generation_.load() != seen; });
      lock.lock();
    }
  }

  std::mutex state_;
  std::condition_variable wake_, done_;
  Job* job_ = nullptr;
  std::atomic<unsigned> generation_{0};
  std::atomic<int> active_{0};
  int threads_ = 0;
};

// Never freed: its threads may outlive every destructor. After a fork the child has none of the
// threads, and perhaps a locked mutex, so it makes its own pool and forgets the parent's.
Pool& pool() {
  static std::atomic<Pool*> current{nullptr};
  const long self = PRUNUS_GETPID();
  Pool* found = current.load();
  while (found == nullptr || found->owner != self) {
    Pool* fresh = new Pool(self);
    if (current.compare_exchange_strong(found, fresh)) return *fresh;
    delete fresh;
  }
  return *found;
}

std::atomic<Team> lent{nullptr};
std::atomic<long> lent_to{0};  // a fork has none of the team's threads, and would wait for them

void work_on(void* job) { static_cast<Job*>(job)->work(); }

}  // namespace

void lend_team(Team team) {
  lent_to.store(PRUNUS_GETPID());
  lent.store(team);
}

bool has_team() { return lent.load() != nullptr && lent_to.load() == PRUNUS_GETPID(); }

bool run_parts(int parts, Part part, void* context) {
  Job job{part, context, parts};
  if (parts > 1) {
    Pool& shared = pool();
    std::unique_lock<std::mutex> lock(shared.busy, std::try_to_lock);
    if (lock.owns_lock()) {
      if (shared.owner != lent_to.load() || lent.load() == nullptr) return shared.run(job);
      lent.load()(work_on, &job, static_cast<unsigned>(parts), 0);
      return job.ok.load();
    }
  }
  job.work();
  return job.ok.load();
}

}  // namespace prunus
