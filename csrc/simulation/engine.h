// When everything of a program happens: discrete events, integers of picoseconds, the same result everywhere.
//
// A node begins when what it waits for is done and all ranks whose memory it touches have started (what is kept for a
// later transfer of its receiver may come before that). Its incoming messages ask
// for their first links; when the last has arrived the chip works (one thing after another); then the outgoing messages
// ask for theirs; with the last of them the node is done. A link serves whoever asked first; of several that ask at one
// time, the one that has come fewer hops, then the one of the earlier transfer, then the one with the nearer target.
#pragma once

#include <deque>
#include <functional>
#include <optional>

#include "simulation/event_queue.h"
#include "simulation/network.h"
#include "simulation/program.h"

namespace hxcomm::simulation {

constexpr uint32_t kNone = UINT32_MAX;

struct Settings {
  std::vector<uint64_t> piece_bytes;
  std::vector<Ps> starts;    // of each rank
  std::vector<Ps> earliest;  // of each node, or empty
  Rate chip;                 // of bytes loaded and stored
  uint32_t credits = 0;      // messages of a link that are not consumed; 0: any number
  bool record = false;
  std::function<void()> poll;  // now and then, so that the user can interrupt
};

struct LinkTotals {
  uint64_t nbytes = 0;
  uint64_t messages = 0;
  Ps busy = 0;
};

struct TimedEvent {
  enum Kind : uint8_t { link, reduces, copies };
  Kind kind;
  uint32_t index;  // a link or a rank
  uint32_t round;
  uint32_t predecessor;
  Ps start;
  Ps end;
  uint64_t nbytes;
};

// A message that waits for a credit when nothing happens any more.
struct Stuck {
  uint32_t link;
  int32_t source;
  int32_t target;
  uint32_t round;
};

struct Outcome {
  std::vector<Ps> finish;    // of each rank
  std::vector<Ps> arrivals;  // of each node: when it was done; only of programs with one instance
  std::vector<LinkTotals> links;
  std::vector<TimedEvent> events;
  std::vector<Stuck> stuck;
};

class Engine {
 public:
  Engine(const Program& program, const std::vector<Link>& links, Routes& routes, const Settings& settings);
  Outcome run();

 private:
  struct State {  // of an instance of a node: what it has to wait for in its present stage
    Ps time;      // when the latest came
    uint32_t pending;
    uint32_t cause;
  };
  struct LinkState {
    Ps free = 0;
    uint64_t last_nbytes = UINT64_MAX;  // most messages are as long as the last
    Ps last_occupied = 0;
    uint32_t last_event = kNone;
    uint32_t taken = 0;  // credits
  };
  struct ChipState {
    Ps free = 0;
    uint32_t last_event = kNone;
  };
  struct Done {
    uint32_t node;
    uint32_t instance;
    Ps time;
    uint32_t cause;
  };

  State& state(uint32_t node, uint32_t instance);
  State* make_states(uint32_t node);
  Ps earliest(uint32_t node, uint32_t instance) const;
  void start();
  static void raise(State& state, Ps time, uint32_t cause);
  void begin(uint32_t node, uint32_t instance, State& state);
  void ask(const Span& messages, uint32_t instance, State& state);
  void incoming_done(uint32_t node, uint32_t instance, State& state);
  void outgoing(uint32_t node, uint32_t instance, State& state);
  void handle(Ps now, const Event& event);
  void request(Ps now, const Event& event);
  void serve(Ps now, const Event& event, uint32_t link);
  void arrive(const Event& event, uint32_t link, Ps time, uint32_t cause);
  void work(Ps now, const Event& event);
  void give_back(uint32_t link, Ps time);
  void give_back_read(uint32_t node, uint32_t instance, Ps time);
  void credit(Ps now, uint32_t link);
  void drain();
  uint32_t record(TimedEvent::Kind kind, uint32_t index, const Node& node, Ps start, Ps end, uint64_t nbytes,
                  uint32_t cause);

  uint32_t instance_of(uint32_t instance, uint32_t turn) const {
    instance += turn;
    return instance >= program_.copies ? instance - program_.copies : instance;
  }
  int rank_of(int32_t rank, uint32_t instance) const {
    rank += static_cast<int32_t>(instance);
    return rank >= program_.world_size ? rank - program_.world_size : rank;
  }
  uint64_t nbytes_of(const Node& node, uint32_t instance) const {
    if (!node.turns) return settings_.piece_bytes[node.chunk];
    const size_t chunk = node.chunk + size_t{instance} * program_.step, all = turning_bytes_.size();
    return turning_bytes_[chunk >= all ? chunk - all : chunk];
  }
  const Route& route_of(const Message& message, uint32_t instance) {
    return routes_.get(message.lane, rank_of(message.source, instance));
  }

  const Program& program_;
  const std::vector<Link>& links_;
  Routes& routes_;
  const Settings& settings_;
  bool starts_alike_;
  std::vector<uint64_t> turning_bytes_;  // of chunks that turn with the ranks
  std::vector<LinkState> link_states_;
  std::vector<ChipState> chips_;
  std::vector<std::deque<Event>> waiting_;  // for a credit of a link
  EventQueue queue_;
  std::vector<Done> done_;
  std::vector<State*> states_;  // of each node, while some of its instances are neither untouched nor done
  std::vector<uint32_t> left_;  // instances of each node that are not done
  std::vector<std::vector<State>> memory_;
  std::vector<State*> unused_;
  Outcome outcome_;
};

}  // namespace hxcomm::simulation
