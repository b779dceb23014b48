// Events in the order of time and, at one time, of their keys.
//
// Chips that do alike have their events at the same times, so the heap holds times, each with a bucket of events, and a
// bucket is sorted when its time has come (it mostly is already). What is added for the time that is being worked on
// comes after it, as a wave of its own.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <utility>
#include <vector>

#include "simulation/network.h"

namespace hxcomm::simulation {

struct Event {
  uint64_t key;       // what comes first at one time
  uint32_t instance;  // of the node; and first among equal keys
  uint32_t what;      // a message, a node or a link
  Ps tail;            // when all of a message has arrived, where only its head has
  uint32_t cause;     // the recorded event that this one follows
  uint32_t hop;

  bool operator<(const Event& other) const { return key != other.key ? key < other.key : instance < other.instance; }
};

class EventQueue {
 public:
  bool empty() const { return heap_.empty(); }

  void push(Ps time, const Event& event) {
    Recent& recent = recent_[static_cast<uint64_t>(time) * 0x9E3779B97F4A7C15u >> 56];
    if (recent.time != time || recent.stamp != stamps_[recent.bucket]) {
      if (free_.empty()) {
        free_.push_back(static_cast<uint32_t>(buckets_.size()));
        buckets_.emplace_back();
        stamps_.push_back(1);
      }
      recent = {time, free_.back(), stamps_[free_.back()]};
      free_.pop_back();
      heap_.emplace_back(time, recent.bucket);
      std::push_heap(heap_.begin(), heap_.end(), later);
    }
    buckets_[recent.bucket].push_back(event);
  }

  // All events of the next time, in order; in `events`, whose memory is used again.
  Ps pop(std::vector<Event>& events) {
    const Ps time = heap_.front().first;
    events.clear();
    while (!heap_.empty() && heap_.front().first == time) {
      const uint32_t bucket = heap_.front().second;
      std::pop_heap(heap_.begin(), heap_.end(), later);
      heap_.pop_back();
      std::vector<Event>& from = buckets_[bucket];
      if (events.empty())
        events.swap(from);
      else
        events.insert(events.end(), from.begin(), from.end());
      from.clear();
      ++stamps_[bucket];  // nothing more is added to it for this time
      free_.push_back(bucket);
    }
    if (!std::is_sorted(events.begin(), events.end())) std::sort(events.begin(), events.end());
    return time;
  }

 private:
  struct Recent {
    Ps time = -1;
    uint32_t bucket = 0;
    uint32_t stamp = 0;  // never that of a bucket
  };
  static bool later(const std::pair<Ps, uint32_t>& a, const std::pair<Ps, uint32_t>& b) { return a > b; }

  std::array<Recent, 256> recent_;
  std::vector<std::pair<Ps, uint32_t>> heap_;
  std::vector<std::vector<Event>> buckets_{1};
  std::vector<uint32_t> stamps_{1};
  std::vector<uint32_t> free_{0};
};

}  // namespace hxcomm::simulation
