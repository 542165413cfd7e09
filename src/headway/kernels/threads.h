// A fixed team of threads that runs one function at a time, with barriers and shared loops in it.
//
// The caller is thread 0. A thread that has nothing to do spins for a moment, because the next
// barrier is often microseconds away, and then sleeps: an idle team takes no processor time.
#pragma once
#include <pthread.h>
#include <sched.h>

#include <atomic>

#if defined(__linux__)
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "memory.h"
#include "simd.h"

namespace headway {

class Team {
 public:
  class Member;

  Team() = default;
  Team(const Team&) = delete;
  ~Team() {
    quits_ = true;
    publish(job_);
    for (int i = 0; i + 1 < num_started_; i++) pthread_join(starts()[i].handle, nullptr);
  }
  // Start the threads; false if the system has no room for them.
  bool start(int size) {
#if defined(__linux__)
    sched_getaffinity(0, sizeof allowed_, &allowed_);
#endif
    if (!loops_.make((size_t)LOOPS * size * sizeof(Next)) || !starts_.make(size * sizeof(Start))) {
      return false;
    }
    for (int i = 0; i < LOOPS * size; i++) new (loops_.as<Next>() + i) Next;
    size_ = size;
    for (num_started_ = 1; num_started_ < size; num_started_++) {
      Start& start = starts()[num_started_ - 1];
      start.team = this;
      start.thread = num_started_;
      auto serve = [](void* argument) -> void* {
        const Start& start = *static_cast<Start*>(argument);
        start.team->serve(start.thread);
        return nullptr;
      };
      if (pthread_create(&start.handle, nullptr, serve, &start) != 0) return false;
    }
    return true;
  }

  // Run function(argument, member) on every thread, and wait for all of them.
  void run(void (*function)(void*, Member&), void* argument);

  // Wait until every thread is here. What was written before it can be read after it.
  void barrier() {
    if (size_ == 1) return;
    const u32 generation = generation_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == (u32)size_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      publish(generation_);
    } else {
      wait(generation_, generation);
    }
  }

  // Bind every thread but the caller to a processor of its own, or to none in particular.
  void pin(bool pinned);

 private:
  // About 50 µs: longer than from one barrier to the next, shorter than anybody would notice.
  static constexpr int SPINS = 2000;
  // Loops whose counters are kept; see ``Member::share``.
  static constexpr int LOOPS = 4;

  struct alignas(64) Next {
    std::atomic<int> value{0};
  };
  struct Start {
    Team* team;
    int thread;
    pthread_t handle;
  };

  Start* starts() const { return starts_.as<Start>(); }
  void serve(int thread);
  void wait(std::atomic<u32>& word, u32 old) {
    for (int i = 0; i < SPINS; i++) {
      if (word.load(std::memory_order_acquire) != old) return;
      pause();
    }
    while (word.load(std::memory_order_acquire) == old) {
#if defined(__linux__)
      sleepers_.fetch_add(1);
      syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, old, nullptr, nullptr, 0);
      sleepers_.fetch_sub(1);
#else
      sched_yield();
#endif
    }
  }
  void publish(std::atomic<u32>& word) {
    word.fetch_add(1);
#if defined(__linux__)
    if (sleepers_.load()) syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, 1 << 30, nullptr, nullptr, 0);
#endif
  }

  int size_ = 0;
  int num_started_ = 0;  // the caller's included
  Buffer loops_, starts_;
  void (*function_)(void*, Member&) = nullptr;
  void* argument_ = nullptr;
  bool quits_ = false;
  u32 next_loop_ = 0;
#if defined(__linux__)
  cpu_set_t allowed_;  // the processors that the process could use when the team was made
#endif
  alignas(64) std::atomic<u32> job_{0};
  alignas(64) std::atomic<u32> generation_{0};
  alignas(64) std::atomic<u32> arrived_{0};
  alignas(64) std::atomic<u32> sleepers_{0};
};

// A thread while it runs a function with the others. Every thread makes the same calls.
class Team::Member {
 public:
  Member(Team& team, int thread) : thread(thread), team_(team), loop_(team.next_loop_) {}

  const int thread;

  // Call body(item) for every item of 0 … count − 1, each on one of the threads; then before() on
  // every thread; then wait for all. A thread takes the items of its own stretch in order, which is
  // the order that memory likes, and then those that others have not come to.
  template <class Body, class Before>
  HW_INLINE void share(int count, Body&& body, Before&& before) {
    const int size = team_.size_;
    if (size == 1) {
      for (int item = 0; item < count; item++) body(item);
      before();
      return;
    }
    // All have left the loop before the last one. Its counters are used again after two barriers.
    if (thread == 0) {
      for (int i = 0; i < size; i++) counters(loop_ + 2)[i].value.store(0, std::memory_order_relaxed);
    }
    Next* next = counters(loop_++);
    for (int i = 0; i < size; i++) {
      const int owner = (thread + i) % size;
      const int begin = (int)((int64_t)count * owner / size);
      const int end = (int)((int64_t)count * (owner + 1) / size);
      for (;;) {
        const int item = begin + next[owner].value.fetch_add(1, std::memory_order_relaxed);
        if (item >= end) break;
        body(item);
      }
    }
    before();
    team_.barrier();
  }
  template <class Body>
  HW_INLINE void share(int count, Body&& body) {
    share(count, body, [] {});
  }
  // For the next function; before its last barrier.
  void leave() {
    if (thread == 0) team_.next_loop_ = loop_;
  }

 private:
  Next* counters(u32 loop) { return team_.loops_.as<Next>() + (size_t)(loop % LOOPS) * team_.size_; }

  Team& team_;
  u32 loop_;
};

inline void Team::run(void (*function)(void*, Member&), void* argument) {
  function_ = function;
  argument_ = argument;
  publish(job_);
  Member member(*this, 0);
  function(argument, member);
  member.leave();
  barrier();
}

inline void Team::serve(int thread) {
  u32 seen = 0;
  for (;;) {
    wait(job_, seen);
    seen++;
    if (quits_) return;
    Member member(*this, thread);
    function_(argument_, member);
    barrier();
  }
}

inline void Team::pin(bool pinned) {
#if defined(__linux__)
  struct Order {
    cpu_set_t allowed;
    bool pinned;
  } order{allowed_, pinned};
  run(
      [](void* argument, Member& member) {
        if (member.thread == 0) return;  // the caller's own business
        const Order& order = *static_cast<Order*>(argument);
        cpu_set_t set = order.allowed;
        if (order.pinned) {
          int place = member.thread % CPU_COUNT(&order.allowed);
          for (int cpu = 0; cpu < CPU_SETSIZE; cpu++) {
            if (!CPU_ISSET(cpu, &order.allowed) || place-- > 0) continue;
            CPU_ZERO(&set);
            CPU_SET(cpu, &set);
            break;
          }
        }
        sched_setaffinity(0, sizeof set, &set);
      },
      &order);
#else
  (void)pinned;
#endif
}

}  // namespace headway
