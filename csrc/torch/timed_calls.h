// When the collectives of one group end in virtual time. Every rank computes the end of all ranks' part from what all
// said when they called (Api::next_timed), so all agree without telling each other anything more.
#pragma once

#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

#include "communicator/api.h"

namespace hxcomm::torch_glue {

class TimedCalls {
 public:
  // The end of each rank's part, and how long after its start the group's next collective may start: links that are
  // free again carry that one while the last bytes of this one are still on their way.
  using Times = std::pair<std::vector<int64_t>, int64_t>;
  // (op, algorithm, bytes of a block, bytes of an element, root, start of each rank's part) -> Times. Python: asked
  // once for each different question.
  using Timer = std::function<Times(int op, const std::string& algorithm, uint64_t nbytes, int item_bytes, int root,
                                    const std::vector<int64_t>& starts_ps)>;

  // Lives as long as the process, for the report at its end.
  static std::shared_ptr<TimedCalls> make(std::string group_name, int rank, int size, Timer timer);

  // A call is about to be posted: says when. Returns what to ask for with end(); 0: it is not timed.
  uint64_t begin(ApiCall& call);
  // Sets this rank's clock to the end of a call that has ended well and that it has waited for.
  void end(const Api& api, void* group, uint64_t ticket);
  // Times what has begun and nobody has waited for. Before the group is released.
  void settle(const Api& api, void* group);
  static py::list report();  // of all groups of this process

 private:
  TimedCalls(std::string group_name, int rank, int size, Timer timer)
      : name_(std::move(group_name)),
        rank_(rank),
        timer_(std::move(timer)),
        next_ps_(static_cast<size_t>(size), 0),
        finished_ps_(static_cast<size_t>(size), 0),
        issued_ps_(static_cast<size_t>(size), 0) {}
  struct StartsHash {
    size_t operator()(const std::vector<int64_t>& starts) const;
  };
  // What runs of one op, algorithm, size and root have taken on this rank.
  struct Row {
    uint64_t calls = 0;
    int64_t ps = 0;
    std::unordered_map<std::vector<int64_t>, Times, StartsHash> times;  // by starts
  };
  using Key = std::tuple<int, std::string, uint64_t, int, int>;  // op, algorithm, bytes, bytes of an element, root
  struct Event {
    const Key* what;
    std::vector<int64_t> starts_ps;  // by rank
    int64_t end_ps;                  // of this rank's part
    int64_t began_ns, ended_ns;      // by the wall clock: from the call until somebody had waited for it
  };
  struct End {
    int64_t ps;
    size_t event;  // its number, where events are recorded
  };
  void take_all(const Api& api, void* group);  // needs mutex_
  void time(const ApiTimedCall& call);

  const std::string name_;
  const int rank_;
  const Timer timer_;
  std::mutex mutex_;                  // held while Python is asked: nobody may wait for it with the GIL
  std::vector<int64_t> next_ps_;      // when the group's next collective may start, by rank
  std::vector<int64_t> finished_ps_;  // of the group's last collective, by rank
  std::vector<int64_t> issued_ps_;
  std::map<Key, Row> rows_;
  uint64_t n_tickets_ = 0;
  std::map<uint64_t, End> ends_;          // by ticket, of calls that nobody has waited for yet
  std::map<uint64_t, int64_t> began_ns_;  // by ticket, until it is timed; where events are recorded
  std::vector<Event> events_;
  uint64_t untimed_[3] = {};  // collectives of CPU tensors, messages, operations on windows
};

}  // namespace hxcomm::torch_glue
