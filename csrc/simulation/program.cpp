#include "simulation/program.h"

#include <algorithm>
#include <tuple>

namespace hxcomm::simulation {
namespace {

constexpr int kInput = 0, kOutput = 1, kMessage = 3;

}  // namespace

Program Program::fold() const {
  Program one = *this;
  one.folded = true;
  one.copies = 1;
  for (Node& node : one.nodes) {
    node.rank = 0;
    node.turns = false;  // all chunks are of one size
    node.chunk = 0;
  }
  for (Message& message : one.messages) message.source = message.target = 0;
  for (auto* edges : {&one.edges, &one.exits, &one.consumed})
    for (Edge& edge : *edges) edge.turn = 0;
  for (Edge& edge : one.exits) edge.target = 0;
  return one;
}

Program Program::of_messages(uint32_t count) {
  Program all;
  all.pieces = count;
  for (uint32_t i = 0; i < count; ++i) {
    Node node{};
    node.chunk = i;
    node.incoming = {i, 1};
    all.nodes.push_back(node);
    all.messages.push_back({i, i, i, 0, 0, false});
  }
  return all;
}

Dataflow::Dataflow(const Shape& shape) : shape_(shape), of_rank_(static_cast<size_t>(shape.world_size)) {
  program_.world_size = shape.world_size;
  program_.pieces = shape.pieces;
  program_.copies = shape.rotation ? static_cast<uint32_t>(shape.world_size) : 1;
}

int32_t Dataflow::turned(int32_t value) const {
  const int32_t n = shape_.world_size;
  value %= n;
  return value < 0 ? value + n : value;
}

int32_t Dataflow::turned_chunk(int64_t chunk, int32_t by) const {
  const int64_t all = static_cast<int64_t>(program_.step) * shape_.world_size;
  chunk = (chunk + static_cast<int64_t>(by) * program_.step) % all;
  return static_cast<int32_t>(chunk < 0 ? chunk + all : chunk);
}

Dataflow::Place Dataflow::place(const At& at, uint32_t rotated) {
  if (at.buffer < 0 || at.buffer > kMessage || at.rank < 0 || at.rank >= shape_.world_size || at.chunk < 0 ||
      static_cast<uint32_t>(at.chunk) >= shape_.chunks[at.buffer])
    throw Malformed("a location does not exist");
  const int buffer = at.buffer == kOutput && shape_.in_place ? kInput : at.buffer;
  if (!shape_.rotation)
    return {{static_cast<uint32_t>(buffer) << 30 | static_cast<uint32_t>(at.rank), static_cast<uint32_t>(at.chunk)}, 0};
  const int turns = rotated >> at.buffer & 1;
  if (turning_[buffer] < 0) turning_[buffer] = turns;
  if (turning_[buffer] != turns) throw NotRotational("a buffer turns in some rounds only");
  if (turns &&
      shape_.chunks[at.buffer] < static_cast<uint64_t>(program_.step) * static_cast<uint64_t>(shape_.world_size))
    throw Malformed("a buffer that turns has too few chunks for all ranks");
  const int32_t chunk = turns ? turned_chunk(at.chunk, -at.rank) : at.chunk;
  return {{static_cast<uint32_t>(buffer) << 30, static_cast<uint32_t>(chunk)}, at.rank};
}

Dataflow::State& Dataflow::state(const Place& place, const At& at) {
  State& found = states_[static_cast<uint64_t>(place.key[0]) << 32 | place.key[1]];
  if (found.chunk < 0) {  // as it is in the beginning: an input's own chunk
    found.owner = shape_.rotation ? 0 : at.rank;
    found.chunk = static_cast<int32_t>(place.key[1]);
    found.turns = shape_.rotation && turning_[place.key[0] >> 30] == 1;
  }
  return found;
}

void Dataflow::make_unique(std::vector<From>& from, size_t first) {
  const auto begin = from.begin() + static_cast<std::ptrdiff_t>(first);
  std::sort(begin, from.end(), [](const From& a, const From& b) { return a.key() < b.key(); });
  from.erase(std::unique(begin, from.end(), [](const From& a, const From& b) { return a.key() == b.key(); }),
             from.end());
}

void Dataflow::add_round(const std::vector<Transfer>& transfers, uint32_t rotated, uint32_t step) {
  ++round_;
  if (rotated != 0) {
    if (step == 0) throw Malformed("a Rotation whose step is 0");
    if (steps_ && step != program_.step) throw NotRotational("buffers turn by different steps");
    steps_ = true;
    program_.step = step;
  }
  const auto first_node = static_cast<uint32_t>(program_.nodes.size());
  refuse_overlap(transfers, rotated, first_node);
  for (const Transfer& transfer : transfers) add_node(transfer, rotated);
  remember(transfers, rotated, first_node);
}

// A transfer may store to what it reads itself: it works element by element.
void Dataflow::refuse_overlap(const std::vector<Transfer>& transfers, uint32_t rotated, uint32_t first_node) {
  std::unordered_map<uint64_t, Toucher> writers;
  const auto key = [](const Place& at) { return static_cast<uint64_t>(at.key[0]) << 32 | at.key[1]; };
  for (uint32_t i = 0; i < transfers.size(); ++i)
    for (const At& at : transfers[i].destinations) {
      const Place written = place(at, rotated);
      writers[key(written)] = {first_node + i, turned(-written.turn)};
    }
  for (uint32_t i = 0; i < transfers.size(); ++i)
    for (const At& at : transfers[i].sources) {
      const Place read = place(at, rotated);
      const auto found = writers.find(key(read));
      if (found == writers.end()) continue;
      if (found->second.node != first_node + i || found->second.turn != turned(-read.turn))
        throw Overlap("a round writes what another transfer of it reads");
    }
}

void Dataflow::add_node(const Transfer& transfer, uint32_t rotated) {
  if (transfer.rank < 0 || transfer.rank >= shape_.world_size || transfer.sources.empty() ||
      transfer.destinations.empty() || (!transfer.reduce && transfer.sources.size() > 1))
    throw Malformed("a transfer of no rank, or without sources or destinations");
  Node node{};
  node.rank = transfer.rank;
  node.round = round_;
  node.reduces = transfer.reduce;
  size(node, transfer, rotated);
  work(node, transfer);
  waits(transfer, rotated);
  messages(node, transfer);
  program_.nodes.push_back(node);
}

// As count_location() of hxcomm/schedule/symbolic.py: the chunk of the rank's own output or input that occurs in the
// transfer, otherwise the one that the value is made of.
void Dataflow::size(Node& node, const Transfer& transfer, uint32_t rotated) {
  const State& value = state(place(transfer.sources[0], rotated), transfer.sources[0]);
  const int32_t by = place(transfer.sources[0], rotated).turn;
  int32_t chunk = value.turns ? turned_chunk(value.chunk, by) : value.chunk;
  bool turns = value.turns;
  const auto own = [&](const std::vector<At>& ats, int buffer) {
    for (const At& at : ats)
      if (at.rank == transfer.rank && at.buffer == buffer) {
        turns = shape_.rotation && (rotated >> at.buffer & 1) != 0;
        chunk = turns ? turned_chunk(at.chunk, 0) : at.chunk;
        return true;
      }
    return false;
  };
  own(transfer.destinations, kOutput) || own(transfer.sources, kOutput) || own(transfer.destinations, kInput) ||
      own(transfer.sources, kInput);
  node.turns = turns;
  node.chunk = turns ? static_cast<uint32_t>(chunk) : static_cast<uint32_t>(chunk) % shape_.pieces;
}

// A reduction loads every source and stores to every destination. Data that has arrived is where it belongs; only what
// lies here already is copied by the chip.
void Dataflow::work(Node& node, const Transfer& transfer) const {
  if (transfer.reduce) {
    node.work = static_cast<uint32_t>(transfer.sources.size() + transfer.destinations.size());
    return;
  }
  const At& source = transfer.sources[0];
  if (source.rank != transfer.rank || source.buffer == kMessage) return;
  const auto memory = [&](int buffer) { return buffer == kOutput && shape_.in_place ? kInput : buffer; };
  for (const At& at : transfer.destinations)
    if (at.rank == transfer.rank && (memory(at.buffer) != memory(source.buffer) || at.chunk != source.chunk))
      ++node.work;
  if (node.work > 0) ++node.work;
}

void Dataflow::waits(const Transfer& transfer, uint32_t rotated) {
  const auto node = static_cast<uint32_t>(program_.nodes.size());
  const size_t first = edges_.size();
  const auto after = [&](const Toucher& toucher, const Place& at) {
    // Instance 0 waits for instance toucher.turn + at.turn, so instance r is waited for by r - that.
    edges_.push_back({toucher.node, {node, static_cast<uint32_t>(turned(-(toucher.turn + at.turn)))}});
  };
  for (const At& at : transfer.sources) {
    const Place read = place(at, rotated);
    const State& found = state(read, at);
    if (found.written) after(found.writer, read);
    if (at.buffer == kMessage && found.written) {
      program_.messages[found.message].held = true;
      consumed_.push_back({node, {found.message, static_cast<uint32_t>(turned(found.writer.turn + read.turn))}});
    }
  }
  for (const At& at : transfer.destinations) {
    const Place written = place(at, rotated);
    const State& found = state(written, at);
    if (found.written && found.readers.empty()) after(found.writer, written);  // readers came after the writer
    for (const Toucher& reader : found.readers) after(reader, written);
  }
  make_unique(edges_, first);
}

void Dataflow::messages(Node& node, const Transfer& transfer) {
  auto& all = program_.messages;
  const uint32_t number =
      shape_.rotation ? static_cast<uint32_t>(program_.nodes.size()) : of_rank_[static_cast<size_t>(transfer.rank)]++;
  node.incoming.first = static_cast<uint32_t>(all.size());
  for (const At& at : transfer.sources)
    if (at.rank != transfer.rank) add_message(at.rank, transfer.rank);
  node.outgoing.first = static_cast<uint32_t>(all.size());
  node.incoming.count = node.outgoing.first - node.incoming.first;
  for (const At& at : transfer.destinations)
    if (at.rank != transfer.rank) add_message(transfer.rank, at.rank);
  node.outgoing.count = static_cast<uint32_t>(all.size()) - node.outgoing.first;
  number_.resize(all.size(), number);
}

void Dataflow::add_message(int32_t source, int32_t target) {
  const int offset = turned(target - source);
  const auto [lane, is_new] = lane_of_.try_emplace(offset, static_cast<uint32_t>(program_.lanes.size()));
  if (is_new) program_.lanes.push_back(offset);
  const auto node = static_cast<uint32_t>(program_.nodes.size());
  program_.messages.push_back({node, lane->second, 0, source, target, false});
}

// Readers first, so that a writer of the same round makes them forgotten: only it may have read there.
void Dataflow::remember(const std::vector<Transfer>& transfers, uint32_t rotated, uint32_t first_node) {
  for (uint32_t i = 0; i < transfers.size(); ++i)
    for (const At& at : transfers[i].sources) {
      const Place read = place(at, rotated);
      auto& readers = state(read, at).readers;
      const Toucher reader{first_node + i, turned(-read.turn)};
      if (readers.empty() || readers.back().node != reader.node || readers.back().turn != reader.turn)
        readers.push_back(reader);
    }
  for (uint32_t i = 0; i < transfers.size(); ++i) {
    const Node& node = program_.nodes[first_node + i];
    uint32_t message = node.outgoing.first;
    for (const At& at : transfers[i].destinations) {
      const Place written = place(at, rotated);
      State& found = state(written, at);
      found.writer = {first_node + i, turned(-written.turn)};
      found.written = true;
      found.readers.clear();
      found.turns = node.turns;
      const auto chunk = static_cast<int32_t>(node.chunk);
      found.chunk = node.turns ? turned_chunk(chunk, -written.turn) : chunk;
      if (at.rank != transfers[i].rank) found.message = message++;
    }
  }
}

void Dataflow::exits() {
  for (const auto& [key, found] : states_) {
    if (static_cast<int>(key >> 62) > kOutput) continue;
    const auto add = [&, owner = found.owner](const Toucher& toucher) {
      if (turned(program_.nodes[toucher.node].rank + toucher.turn) == owner) return;
      exits_.push_back({toucher.node, {static_cast<uint32_t>(owner), static_cast<uint32_t>(turned(-toucher.turn))}});
    };
    if (found.written) add(found.writer);
    for (const Toucher& reader : found.readers) add(reader);
  }
}

// Program order of the executing rank, then nearest first; the same for every rank of a rotation.
void Dataflow::order_messages() {
  std::vector<std::tuple<uint32_t, int, int, uint32_t>> keys;
  keys.reserve(program_.messages.size());
  for (uint32_t i = 0; i < program_.messages.size(); ++i) {
    const int up = turned(program_.messages[i].target - program_.messages[i].source);
    keys.emplace_back(number_[i], std::min(up, shape_.world_size - up), up, i);
  }
  std::sort(keys.begin(), keys.end());
  for (uint32_t i = 0; i < keys.size(); ++i) program_.messages[std::get<3>(keys[i])].order = i;
}

Span Dataflow::gather(std::vector<From>& from, uint32_t node, size_t& next, std::vector<Edge>& out) {
  Span span{static_cast<uint32_t>(out.size()), 0};
  for (; next < from.size() && from[next].node == node; ++next, ++span.count) out.push_back(from[next].edge);
  return span;
}

Program Dataflow::finish() {
  exits();
  order_messages();
  for (const From& each : edges_) ++program_.nodes[each.edge.target].waits;
  for (auto* from : {&edges_, &exits_, &consumed_}) make_unique(*from, 0);
  size_t edge = 0, exit = 0, consumed = 0;
  for (uint32_t i = 0; i < program_.nodes.size(); ++i) {
    program_.nodes[i].edges = gather(edges_, i, edge, program_.edges);
    program_.nodes[i].exits = gather(exits_, i, exit, program_.exits);
    program_.nodes[i].consumed = gather(consumed_, i, consumed, program_.consumed);
  }
  return std::move(program_);
}

}  // namespace hxcomm::simulation
