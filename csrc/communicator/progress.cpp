#include "communicator/progress.h"

#include <pthread.h>

#include <csignal>

#include "communicator/group.h"

namespace hxcomm {
namespace {

// The thread looks at deadlines this often while it sleeps on the doorbell.
constexpr int64_t kLookUpNs = 50'000'000;

}  // namespace

Progress::~Progress() { stop_background(); }

void Progress::stop_background() {
  {
    std::lock_guard lock(thread_mutex_);
    stop_ = true;
    wake_.notify_all();
  }
  endpoint_->ring_own_doorbell();
  if (thread_.joinable()) thread_.join();
}

void Progress::add(const std::shared_ptr<Group>& group) {
  std::lock_guard lock(groups_mutex_);
  groups_.push_back(group);
}

void Progress::remove(const Group* group) {
  std::lock_guard lock(groups_mutex_);
  std::erase_if(groups_, [&](const std::weak_ptr<Group>& weak) {
    const auto strong = weak.lock();
    return !strong || strong.get() == group;
  });
}

std::vector<std::shared_ptr<Group>> Progress::groups() {
  std::vector<std::shared_ptr<Group>> alive;
  std::lock_guard lock(groups_mutex_);
  for (const auto& weak : groups_)
    if (auto group = weak.lock()) alive.push_back(std::move(group));
  return alive;
}

bool Progress::advance_all() {
  if (pending_.load(std::memory_order_relaxed) == 0) return false;
  bool moved = false;
  for (const auto& group : groups())
    if (group->has_posted()) moved = group->try_advance(/*look_at_clock=*/true) || moved;
  return moved;
}

void Progress::wake_background() {
  std::lock_guard lock(thread_mutex_);
  if (stop_) return;
  woken_ = true;
  if (!thread_.joinable()) {
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    thread_ = std::thread([this] { run(); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread_.native_handle(), "hxcomm-progress");
  }
  wake_.notify_all();
}

void Progress::run() {
  for (;;) {
    {
      std::unique_lock lock(thread_mutex_);
      wake_.wait(lock, [this] { return woken_ || stop_; });
      if (stop_) return;
      woken_ = false;
    }
    while (pending_.load() > 0 && waiters_.load() == 0) {
      const uint32_t doorbell = endpoint_->announce_sleep();
      const bool moved = advance_all();
      if (!moved && pending_.load() > 0) endpoint_->sleep(doorbell, kLookUpNs);
      endpoint_->withdraw_sleep();
      std::lock_guard lock(thread_mutex_);
      if (stop_) return;
    }
  }
}

}  // namespace hxcomm
