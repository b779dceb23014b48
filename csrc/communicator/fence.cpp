// Who may still write: before the memory of a failed operation is used for something else, every process that could be
// in the middle of a store must have said that it is not.
//
// A process acknowledges the abort of a group once nothing of it runs there any more. The thread that fails the last
// operation does; where nothing was pending, the watcher does, which a peer wakes by knocking: it needs no GIL, so only
// a process that is stopped, or starved, stays silent.
#include "communicator/group.h"

namespace hxcomm {

void Group::acknowledge_abort() {
  if (forked() || !own().abort.is_set()) return;
  {
    const std::unique_lock lock(driver_, std::try_to_lock);
    // Who holds it is in an operation, and acknowledges when the queue is empty; or knocks will come again.
    if (!lock.owns_lock()) return;
    const std::lock_guard queue(queue_mutex_);
    if (queue_.empty() && !one_sided_.is_copying()) own().abort.acknowledge();
  }
  endpoint_->ring_own_doorbell();  // a waiter may have found the lock taken
}

std::vector<int> Group::not_fenced(const std::vector<int>& ranks, bool tell) {
  refuse_after_fork();
  std::vector<int> open;
  for (const int rank : ranks) {
    const auto& peer = peers_.at(static_cast<size_t>(rank));
    if (peer && !peer->dead.load(std::memory_order_acquire) && control(rank).line.is_member(config_.nonce) &&
        !control(rank).abort.is_acknowledged())
      open.push_back(rank);
  }
  if (!tell || open.empty()) return open;
  // Who has left may write to a page no more: its owner may give it back.
  if (has_left()) {
    for (const int rank : open) knock(peers_[static_cast<size_t>(rank)]->address);
    return open;
  }
  const auto me = static_cast<uint32_t>(config_.rank);
  {
    const std::lock_guard lock(abort_mutex_);
    if (own().reason[0] == '\0') {
      const std::string text = config_.labels[me] + " has reconfigured the communicator without this rank";
      own().reason[text.copy(own().reason, Control::kReasonBytes - 1)] = '\0';
    }
    for (const int rank : open) control(rank).abort.set(abort_word(AbortCause::called, me, me));
  }
  ring_sleepers();
  for (const int rank : open) knock(peers_[static_cast<size_t>(rank)]->address);
  return open;
}

void Group::kill(int rank) const {
  if (const auto& peer = peers_.at(static_cast<size_t>(rank))) peer->kill();
}

}  // namespace hxcomm
