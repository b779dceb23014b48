// A Schedule as the engine runs it: what each transfer sends, works and waits for.
//
// A node is a transfer of one rank, or, where all rounds are Rotations, the transfers of all ranks that are alike: then
// there are `copies` instances of it, instance r being rank 0's turned by r, and an edge says by how much it turns.
// So a ring of 4,096 chips is 8,190 nodes, and its 33.5 million transfers exist only while they run.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <unordered_map>
#include <vector>

namespace hxcomm::simulation {

struct Message {
  uint32_t node;
  uint32_t lane;
  uint32_t order;  // among those that ask for a link at the same time after as many hops
  int32_t source;  // ranks, of instance 0
  int32_t target;
  bool held;  // stays in its receiver's memory until another transfer has read it
};

struct Edge {
  uint32_t target;  // a node, or a rank
  uint32_t turn;    // added to the instance
};

struct Span {
  uint32_t first = 0;
  uint32_t count = 0;
};

struct Node {
  int32_t rank;  // of instance 0
  uint32_t round;
  uint32_t chunk;  // of instance 0; instance r has the one `step * r` further on, where it turns
  bool turns;
  bool reduces;
  uint32_t work;  // chunks that the chip loads and stores
  uint32_t waits = 0;
  Span incoming;  // messages
  Span outgoing;
  Span edges;     // the nodes that wait for this one
  Span exits;     // the other ranks that may not return before it is done
  Span consumed;  // messages of others that it reads
};

struct Program {
  int world_size = 1;
  uint32_t copies = 1;
  uint32_t pieces = 1;
  uint32_t step = 1;  // chunks that belong to each rank in buffers that turn
  bool folded = false;
  std::vector<Node> nodes;
  std::vector<Message> messages;
  std::vector<Edge> edges, exits, consumed;
  std::vector<int> lanes;  // how many ranks further on each leads

  // One rank's part, standing for all of them: exact where ranks, links and sizes are alike.
  Program fold() const;
  // Messages that wait for nothing, a lane and a piece each.
  static Program of_messages(uint32_t count);
};

struct At {
  int32_t rank;
  int32_t buffer;  // input, output, scratch, message
  int32_t chunk;
};

struct Transfer {
  int32_t rank;
  bool reduce;
  std::vector<At> sources;
  std::vector<At> destinations;
};

struct Shape {
  int world_size = 1;
  uint32_t pieces = 1;
  bool in_place = false;
  bool rotation = false;              // all rounds are
  uint32_t chunks[4] = {0, 0, 0, 0};  // of each buffer
};

// A location that does not exist; the caller knows how to say which.
struct Malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// Rounds that turn a buffer and rounds that do not: it has to be written out.
struct NotRotational : std::runtime_error {
  using std::runtime_error::runtime_error;
};
// A round writes what another transfer of it reads: it has to be separated.
struct Overlap : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Derives the edges as hxcomm/schedule/compile.py does the waits: a transfer follows the last writers of its sources,
// and the last writers and the readers of its destinations.
class Dataflow {
 public:
  explicit Dataflow(const Shape& shape);

  // rotated: bit b is set where buffer b turns with the ranks, by `step` chunks a rank. Only of a rotation.
  void add_round(const std::vector<Transfer>& transfers, uint32_t rotated, uint32_t step);
  Program finish();

 private:
  struct Toucher {
    uint32_t node;
    int32_t turn;  // instance `turn` of the node touched the representative
  };
  struct Place {
    uint32_t key[2];
    int32_t turn;  // the location is the representative turned by so much
  };
  struct State {
    Toucher writer{0, 0};
    bool written = false;
    bool turns = false;  // the value's chunk
    int32_t chunk = -1;  // of the representative's value
    int32_t owner = 0;
    uint32_t message = 0;  // that brought it
    uint32_t round = 0;    // in which it was last written, from 1
    std::vector<Toucher> readers;
  };

  Place place(const At& at, uint32_t rotated);
  State& state(const Place& place, const At& at);
  void refuse_overlap(const std::vector<Transfer>& transfers, uint32_t rotated, uint32_t first_node);
  void add_node(const Transfer& transfer, uint32_t rotated);
  void size(Node& node, const Transfer& transfer, uint32_t rotated);
  void work(Node& node, const Transfer& transfer) const;
  void waits(const Transfer& transfer, uint32_t rotated);
  void messages(Node& node, const Transfer& transfer);
  void add_message(int32_t source, int32_t target);
  void remember(const std::vector<Transfer>& transfers, uint32_t rotated, uint32_t first_node);
  void exits();
  void order_messages();
  int32_t turned(int32_t value) const;  // into [0, world size)
  int32_t turned_chunk(int64_t chunk, int32_t by) const;

  struct From {
    uint32_t node;
    Edge edge;

    std::tuple<uint32_t, uint32_t, uint32_t> key() const { return {node, edge.target, edge.turn}; }
  };
  static void make_unique(std::vector<From>& from, size_t first);
  static Span gather(std::vector<From>& from, uint32_t node, size_t& next, std::vector<Edge>& out);

  Shape shape_;
  Program program_;
  uint32_t round_ = 0;
  int turning_[4] = {-1, -1, -1, -1};
  bool steps_ = false;  // program_.step is known
  std::unordered_map<uint64_t, State> states_;
  std::unordered_map<int, uint32_t> lane_of_;
  std::vector<From> edges_, exits_, consumed_;
  std::vector<uint32_t> number_;  // of each message's transfer among those of its rank
  std::vector<uint32_t> of_rank_;
};

}  // namespace hxcomm::simulation
