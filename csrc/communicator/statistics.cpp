// What a group counts, and what remains of it when the group has ended.
#include <algorithm>

#include "communicator/group.h"

namespace hxcomm {

std::shared_ptr<Statistic> Group::statistic_of(const Call& call, const Choice& choice) {
  for (const auto& known : statistics_)
    if (known->plan->hash == choice.plan->hash && known->dtype == call.dtype) return known;
  auto fresh = std::make_shared<Statistic>();
  fresh->op = call.op;
  fresh->root = call.root;
  fresh->dtype = call.dtype;
  fresh->plan = choice.plan;
  return statistics_.emplace_back(std::move(fresh));
}

// Of what is no collective, its calls and elements. How long it took is not counted: one posted early waits for nobody.
void Group::count_message(const Op& op) {
  if (!config_.keep_statistics || op.error) return;
  std::lock_guard lock(planner_mutex_);
  const Call& call = op.call;
  auto known = std::find_if(statistics_.begin(), statistics_.end(),
                            [&](const auto& each) { return each->op == call.op && each->dtype == call.dtype; });
  if (known == statistics_.end()) {
    static const auto no_plan = std::make_shared<const Plan>();
    auto fresh = std::make_shared<Statistic>();
    fresh->op = call.op;
    fresh->root = -1;
    fresh->dtype = call.dtype;
    fresh->plan = no_plan;
    known = statistics_.insert(statistics_.end(), std::move(fresh));
  }
  (*known)->calls.fetch_add(1, std::memory_order_relaxed);
  (*known)->elements.fetch_add(call.count, std::memory_order_relaxed);
}

std::vector<std::shared_ptr<const Statistic>> Group::statistics() const {
  std::lock_guard lock(planner_mutex_);
  return {statistics_.begin(), statistics_.end()};
}

// For `hxcomm stats`, which shows groups that have ended as well.
void Group::keep_statistics() {
  if (!config_.keep_statistics) return;
  std::lock_guard lock(planner_mutex_);
  for (const auto& statistic : statistics_) progress_->remember({config_.name, config_.world_size, hosts(), statistic});
}

void Progress::remember(const Past& past) {
  std::lock_guard lock(past_mutex_);
  const Statistic& one = *past.statistic;
  // Groups that a program makes and destroys again and again have one name, and take one place.
  for (const auto& [group, world_size, hosts, known] : past_) {
    if (group != past.group || known->op != one.op || known->dtype != one.dtype || known->plan->hash != one.plan->hash)
      continue;
    known->calls += one.calls;
    known->elements += one.elements;
    known->time_ns += one.time_ns;
    known->waiting_ns += one.waiting_ns;
    return;
  }
  past_.push_back(past);
}

std::vector<Progress::Past> Progress::past() {
  std::lock_guard lock(past_mutex_);
  return past_;
}

}  // namespace hxcomm
