// The links of simulated chips, and the links by which each message of a program travels.
#pragma once

#include <cstdint>
#include <functional>
#include <utility>
#include <vector>

namespace hxcomm::simulation {

using Ps = int64_t;  // picoseconds: 2^63 of them are 106 days

// Picoseconds that a byte takes, as an exact fraction: sums of rounded rates would depend on their order.
struct Rate {
  uint64_t numerator = 0;
  uint64_t denominator = 1;

  Ps ps(uint64_t nbytes) const {
    return static_cast<Ps>(static_cast<unsigned __int128>(nbytes) * numerator / denominator);
  }
};

struct Link {
  Rate rate;
  Ps latency = 0;
  Ps per_message = 0;
  Ps tick = 1;
  bool cut_through = false;

  Ps occupied(uint64_t nbytes) const { return (per_message + rate.ps(nbytes)) / tick * tick; }
};

using Route = std::vector<uint32_t>;
using RouteOf = std::function<Route(int source, int target)>;

// A lane is all routes to the rank that is so many ranks further on. Asked for when the first message takes it.
class Routes {
 public:
  // Of `sources` ranks, the first of world_size.
  Routes(std::vector<int> lanes, int world_size, int sources, RouteOf route_of)
      : offsets_(std::move(lanes)),
        world_size_(world_size),
        sources_(static_cast<size_t>(sources)),
        route_of_(std::move(route_of)),
        lanes_(offsets_.size()) {}
  // One lane, with one route, for each message.
  explicit Routes(const std::vector<Route>& routes) {
    for (const Route& route : routes) lanes_.push_back({route});
  }

  const Route& get(uint32_t lane, int source) {
    std::vector<Route>& routes = lanes_[lane];
    if (routes.empty()) routes.resize(sources_);
    Route& route = routes[static_cast<size_t>(source)];
    if (route.empty()) route = route_of_(source, (source + offsets_[lane]) % world_size_);
    return route;
  }

 private:
  std::vector<int> offsets_;
  int world_size_ = 1;
  size_t sources_ = 1;
  RouteOf route_of_;
  std::vector<std::vector<Route>> lanes_;
};

}  // namespace hxcomm::simulation
