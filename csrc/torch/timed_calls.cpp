#include "torch/timed_calls.h"

#include <algorithm>

#include "torch/device/virtual_clock.h"
#include "torch/tensors.h"

namespace hxcomm::torch_glue {
namespace {

constexpr int kRegionBits = 16;         // of a ticket: where the call was issued
constexpr size_t kMostPending = 65536;  // a program that never waits must not grow this forever
constexpr size_t kMostStarts = 65536;
constexpr size_t kMostEvents = size_t{1} << 20;

uint16_t region_of(uint64_t ticket) { return static_cast<uint16_t>(ticket); }

std::mutex all_mutex;
std::vector<std::shared_ptr<TimedCalls>>& all() {
  static auto* groups = new std::vector<std::shared_ptr<TimedCalls>>;
  return *groups;
}

}  // namespace

std::shared_ptr<TimedCalls> TimedCalls::make(std::string group_name, int rank, int size, Timer timer) {
  std::shared_ptr<TimedCalls> made(new TimedCalls(std::move(group_name), rank, size, std::move(timer)));
  const std::lock_guard lock(all_mutex);
  all().push_back(made);
  return made;
}

size_t TimedCalls::StartsHash::operator()(const std::vector<int64_t>& starts) const {
  uint64_t hash = 0;
  for (const int64_t start : starts) {
    hash = (hash ^ static_cast<uint64_t>(start)) * 0x9E3779B97F4A7C15ull;
    hash ^= hash >> 32;
  }
  return static_cast<size_t>(hash);
}

uint64_t TimedCalls::begin(ApiCall& call) {
  const std::lock_guard lock(mutex_);
  const bool collective = call.op <= kBarrier;
  if (!collective || call.device != static_cast<int>(DeviceKind::hx)) {
    ++untimed_[collective ? 0 : call.op <= kRecv ? 1 : 2];
    return 0;
  }
  call.issue_ps = device::clock_now_ps();
  call.ticket = (++n_tickets_ << kRegionBits) | device::clock_region();
  if (device::clock_records()) began_ns_[call.ticket] = device::wall_ns();
  return call.ticket;
}

void TimedCalls::end(const Api& api, void* group, uint64_t ticket) {
  if (ticket == 0) return;
  const std::lock_guard lock(mutex_);
  take_all(api, group);
  const auto found = ends_.find(ticket);
  if (found == ends_.end()) return;
  device::clock_wait_until(found->second.ps, region_of(ticket));
  if (found->second.event < events_.size()) events_[found->second.event].ended_ns = device::wall_ns();
  ends_.erase(found);
}

void TimedCalls::settle(const Api& api, void* group) {
  const std::lock_guard lock(mutex_);
  take_all(api, group);
}

void TimedCalls::take_all(const Api& api, void* group) {
  ApiTimedCall call{};
  call.issued_ps = issued_ps_.data();
  while (api.next_timed(group, &call) != 0) time(call);
}

void TimedCalls::time(const ApiTimedCall& call) {
  std::vector<int64_t> starts(issued_ps_.size());
  for (size_t r = 0; r < starts.size(); ++r) starts[r] = std::max(issued_ps_[r], next_ps_[r]);
  const int64_t first = *std::min_element(starts.begin(), starts.end());
  std::vector<int64_t> relative = starts;
  for (int64_t& start : relative) start -= first;

  const auto row = rows_.try_emplace({call.op, call.algorithm, call.nbytes, call.item_bytes, call.root}).first;
  auto& times = row->second.times;
  auto known = times.find(relative);
  if (known == times.end()) {
    Times answer = timer_(call.op, call.algorithm, call.nbytes, call.item_bytes, call.root, relative);
    TORCH_CHECK(answer.first.size() == starts.size(), "the simulated chips' collective ends on ", answer.first.size(),
                " ranks, the group has ", starts.size());
    if (times.size() >= kMostStarts) times.clear();
    known = times.emplace(std::move(relative), std::move(answer)).first;
  }
  const auto& [ends, gap] = known->second;
  const auto me = static_cast<size_t>(rank_);
  const int64_t before = finished_ps_[me];
  for (size_t r = 0; r < starts.size(); ++r) {
    next_ps_[r] = starts[r] + gap;
    finished_ps_[r] = std::max(finished_ps_[r], first + ends[r]);
  }
  ++row->second.calls;
  row->second.ps += finished_ps_[me] - starts[me];
  // Time in which several calls travel at once passes once.
  device::clock_communicated(finished_ps_[me] - std::max(starts[me], before), region_of(call.ticket));

  size_t event = kMostEvents;
  if (const auto began = began_ns_.find(call.ticket); began != began_ns_.end()) {
    if (events_.size() < kMostEvents) {
      event = events_.size();
      events_.push_back({&row->first, std::move(starts), finished_ps_[me], began->second, device::wall_ns()});
    }
    began_ns_.erase(began);
  }
  ends_[call.ticket] = {finished_ps_[me], event};
  if (ends_.size() > kMostPending) ends_.erase(ends_.begin());
}

py::list TimedCalls::report() {
  std::vector<std::shared_ptr<TimedCalls>> groups;
  {
    const std::lock_guard lock(all_mutex);
    groups = all();
  }
  py::list reports;
  for (const auto& group : groups) {
    // Not with the GIL: whoever holds the lock may wait for that.
    std::unique_lock lock(group->mutex_, std::defer_lock);
    {
      const py::gil_scoped_release no_gil;
      lock.lock();
    }
    py::list rows, events;
    for (const auto& [key, row] : group->rows_) rows.append(py::make_tuple(key, row.calls, row.ps));
    for (const Event& event : group->events_)
      events.append(py::make_tuple(*event.what, event.starts_ps, event.end_ps, event.began_ns, event.ended_ns));
    reports.append(py::make_tuple(group->name_, group->rank_, rows,
                                  py::make_tuple(group->untimed_[0], group->untimed_[1], group->untimed_[2]), events));
  }
  return reports;
}

}  // namespace hxcomm::torch_glue
