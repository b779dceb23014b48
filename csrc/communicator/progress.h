// What moves the operations of a process that nobody is waiting for: one background thread over all its groups.
//
// Whoever waits drives; a blocked waiter advances every group of the process before it sleeps, so operations of
// different groups may be posted in any order on different ranks. The thread runs only while there are posted
// operations and no waiter.
#pragma once

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "transport/endpoint.h"

namespace hxcomm {

class Group;
struct Statistic;

// Whoever makes one calls stop_background() before giving it up: the thread holds a group while it advances it, and a
// group that it is the last to hold would end the thread from within.
class Progress {
 public:
  explicit Progress(std::shared_ptr<Endpoint> endpoint) : endpoint_(std::move(endpoint)) {}
  ~Progress();

  void add(const std::shared_ptr<Group>& group);
  void remove(const Group* group);
  std::vector<std::shared_ptr<Group>> groups();  // that are not destroyed

  // What a group that has ended did with one algorithm of one op.
  struct Past {
    std::string group;
    int world_size;
    std::vector<int> hosts;
    std::shared_ptr<Statistic> statistic;
  };
  void remember(const Past& past);
  std::vector<Past> past();

  // Advances every group that has posted operations and no driver. True if anything moved.
  bool advance_all();

  // A foreground thread waits from construction to destruction; the background thread stays out of its way.
  class Waiter {
   public:
    explicit Waiter(Progress& progress) : progress_(progress) { progress_.waiters_.fetch_add(1); }
    ~Waiter() {
      if (progress_.waiters_.fetch_sub(1) == 1 && progress_.pending_.load() > 0) progress_.wake_background();
    }
    Waiter(const Waiter&) = delete;
    Waiter& operator=(const Waiter&) = delete;

   private:
    Progress& progress_;
  };

  void operation_posted() { pending_.fetch_add(1); }
  void operation_finished() { pending_.fetch_sub(1); }
  // Starts the thread at the first call; later ones wake it.
  void wake_background();
  // Ends it, and waits for what it is doing. From then on only waiters drive.
  void stop_background();

  // Called about every 100 ms by a blocked foreground thread: true ends the wait (Ctrl-C). May be empty.
  std::function<bool()> interrupted;

  // Writes where the caller of a posted call stands, e.g. "train.py:41", and a NUL. On the caller's thread. May be
  // empty.
  std::function<void(char* text, size_t size)> call_site;

 private:
  void run();

  std::shared_ptr<Endpoint> endpoint_;
  std::mutex groups_mutex_;
  std::vector<std::weak_ptr<Group>> groups_;
  std::mutex past_mutex_;
  std::vector<Past> past_;
  std::atomic<int> waiters_{0};
  std::atomic<int> pending_{0};
  std::mutex thread_mutex_;
  std::condition_variable wake_;
  bool woken_ = false;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace hxcomm
