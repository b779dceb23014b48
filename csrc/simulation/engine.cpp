#include "simulation/engine.h"

namespace hxcomm::simulation {
namespace {

constexpr uint64_t kWork = uint64_t{1} << 62, kCredit = uint64_t{1} << 63;
constexpr uint64_t kEventsBetweenPolls = 1 << 20;

bool all_equal(const std::vector<Ps>& times) {
  return std::all_of(times.begin(), times.end(), [&](Ps each) { return each == times[0]; });
}

}  // namespace

Engine::Engine(const Program& program, const std::vector<Link>& links, Routes& routes, const Settings& settings)
    : program_(program),
      links_(links),
      routes_(routes),
      settings_(settings),
      starts_alike_(settings.earliest.empty() && all_equal(settings.starts)),
      link_states_(links.size()),
      chips_(settings.starts.size()),
      waiting_(settings.credits > 0 ? links.size() : 0),
      states_(program.nodes.size()),
      left_(program.nodes.size(), program.copies) {
  outcome_.finish = settings.starts;
  outcome_.links.resize(links.size());
  if (program.copies > 1)
    for (uint32_t chunk = 0; chunk < program.step * program.copies; ++chunk)
      turning_bytes_.push_back(settings.piece_bytes[chunk % program.pieces]);
  if (program.copies == 1) {
    memory_.emplace_back(program.nodes.size());
    outcome_.arrivals.resize(program.nodes.size());
  }
}

Outcome Engine::run() {
  start();
  std::vector<Event> events;
  uint64_t handled = 0;
  while (!queue_.empty()) {
    const Ps now = queue_.pop(events);
    for (const Event& event : events) {
      handle(now, event);
      drain();
    }
    handled += events.size();
    if (handled >= kEventsBetweenPolls && settings_.poll) {
      settings_.poll();
      handled = 0;
    }
  }
  for (uint32_t link = 0; link < waiting_.size(); ++link)
    for (const Event& event : waiting_[link]) {
      const Message& message = program_.messages[event.what];
      outcome_.stuck.push_back({link, rank_of(message.source, event.instance), rank_of(message.target, event.instance),
                                program_.nodes[message.node].round});
    }
  return std::move(outcome_);
}

void Engine::start() {
  for (uint32_t node = 0; node < program_.nodes.size(); ++node) {
    if (program_.nodes[node].waits > 0) continue;
    for (uint32_t instance = 0; instance < program_.copies; ++instance) {
      begin(node, instance, state(node, instance));
      drain();
    }
  }
}

Engine::State& Engine::state(uint32_t node, uint32_t instance) {
  State* states = states_[node];
  if (states == nullptr) states = make_states(node);
  return states[instance];
}

Engine::State* Engine::make_states(uint32_t node) {
  State*& states = states_[node];
  if (program_.copies == 1) {
    states = &memory_[0][node];
  } else {
    if (unused_.empty()) {
      memory_.emplace_back(program_.copies);
      unused_.push_back(memory_.back().data());
    }
    states = unused_.back();
    unused_.pop_back();
  }
  for (uint32_t instance = 0; instance < program_.copies; ++instance)
    states[instance] = {starts_alike_ ? settings_.starts[0] : earliest(node, instance), program_.nodes[node].waits,
                        kNone};
  return states;
}

Ps Engine::earliest(uint32_t number, uint32_t instance) const {
  const Node& node = program_.nodes[number];
  const auto start = [&](int32_t rank) { return settings_.starts[static_cast<size_t>(rank_of(rank, instance))]; };
  Ps time = start(node.rank);
  for (const Span& span : {node.incoming, node.outgoing})
    for (uint32_t i = span.first; i < span.first + span.count; ++i) {
      const Message& message = program_.messages[i];
      time = std::max(time, start(message.source));
      if (!message.held) time = std::max(time, start(message.target));
    }
  return settings_.earliest.empty() ? time : std::max(time, settings_.earliest[number]);
}

void Engine::raise(State& state, Ps time, uint32_t cause) {
  if (time > state.time || (time == state.time && state.cause == kNone)) state.cause = cause;
  state.time = std::max(state.time, time);
}

void Engine::begin(uint32_t number, uint32_t instance, State& state) {
  const Node& node = program_.nodes[number];
  if (node.incoming.count == 0 || nbytes_of(node, instance) == 0)
    incoming_done(number, instance, state);
  else
    ask(node.incoming, instance, state);
}

void Engine::ask(const Span& messages, uint32_t instance, State& state) {
  state.pending = messages.count;
  const Ps time = state.time;
  for (uint32_t i = messages.first; i < messages.first + messages.count; ++i)
    queue_.push(time, {program_.messages[i].order, instance, i, time, state.cause, 0});
}

void Engine::incoming_done(uint32_t number, uint32_t instance, State& state) {
  const Node& node = program_.nodes[number];
  if (node.work > 0 && nbytes_of(node, instance) > 0) {
    queue_.push(state.time, {kWork | number, instance, number, 0, state.cause, 0});
    return;
  }
  if (settings_.credits > 0) give_back_read(number, instance, state.time);
  outgoing(number, instance, state);
}

void Engine::outgoing(uint32_t number, uint32_t instance, State& state) {
  const Node& node = program_.nodes[number];
  if (node.outgoing.count == 0 || nbytes_of(node, instance) == 0)
    done_.push_back({number, instance, state.time, state.cause});
  else
    ask(node.outgoing, instance, state);
}

void Engine::handle(Ps now, const Event& event) {
  if (event.key < kWork)
    request(now, event);
  else if (event.key < kCredit)
    work(now, event);
  else
    credit(now, event.what);
}

void Engine::request(Ps now, const Event& event) {
  const uint32_t link = route_of(program_.messages[event.what], event.instance)[event.hop];
  if (settings_.credits > 0) {
    if (link_states_[link].taken == settings_.credits || !waiting_[link].empty()) {
      waiting_[link].push_back(event);
      return;
    }
    ++link_states_[link].taken;
  }
  serve(now, event, link);
}

void Engine::serve(Ps now, const Event& event, uint32_t number) {
  const Message& message = program_.messages[event.what];
  const Node& node = program_.nodes[message.node];
  const uint64_t nbytes = nbytes_of(node, event.instance);
  const Link& link = links_[number];
  LinkState& state = link_states_[number];
  if (state.last_nbytes != nbytes) {
    state.last_nbytes = nbytes;
    state.last_occupied = link.occupied(nbytes);
  }
  const Ps begin = std::max(now, state.free);
  const Ps end = std::max(begin + state.last_occupied, event.tail);
  uint32_t recorded = kNone;
  if (settings_.record) {
    recorded =
        record(TimedEvent::link, number, node, begin, end, nbytes, state.free > now ? state.last_event : event.cause);
    state.last_event = recorded;
  }
  state.free = end;
  LinkTotals& totals = outcome_.links[number];
  totals.nbytes += nbytes;
  totals.messages += 1;
  totals.busy += state.last_occupied;
  const Route& route = route_of(message, event.instance);
  if (settings_.credits > 0 && event.hop > 0) give_back(route[event.hop - 1], end);
  if (event.hop + 1 == route.size()) {
    arrive(event, number, end + link.latency, recorded);
    return;
  }
  const Ps tail = end + link.latency;
  const Ps next = link.cut_through ? begin + link.latency : tail;
  const uint32_t hop = event.hop + 1;
  queue_.push(next, {uint64_t{hop} << 32 | message.order, event.instance, event.what, tail, recorded, hop});
}

void Engine::arrive(const Event& event, uint32_t link, Ps time, uint32_t cause) {
  const Message& message = program_.messages[event.what];
  const Node& node = program_.nodes[message.node];
  State& waiting = state(message.node, event.instance);
  raise(waiting, time, cause);
  const bool incoming = event.what < node.incoming.first + node.incoming.count;
  if (settings_.credits > 0 && !incoming && !message.held) give_back(link, time);
  if (--waiting.pending > 0) return;
  if (incoming)
    incoming_done(message.node, event.instance, waiting);
  else
    done_.push_back({message.node, event.instance, waiting.time, waiting.cause});
}

void Engine::work(Ps now, const Event& event) {
  const Node& node = program_.nodes[event.what];
  const auto rank = static_cast<uint32_t>(rank_of(node.rank, event.instance));
  ChipState& chip = chips_[rank];
  const uint64_t nbytes = nbytes_of(node, event.instance) * node.work;
  const Ps begin = std::max(now, chip.free);
  const Ps end = begin + settings_.chip.ps(nbytes);
  State& waiting = state(event.what, event.instance);
  if (settings_.record) {
    waiting.cause = record(node.reduces ? TimedEvent::reduces : TimedEvent::copies, rank, node, begin, end, nbytes,
                           chip.free > now ? chip.last_event : event.cause);
    chip.last_event = waiting.cause;
  }
  chip.free = end;
  waiting.time = end;
  if (settings_.credits > 0) give_back_read(event.what, event.instance, end);
  outgoing(event.what, event.instance, waiting);
}

void Engine::give_back(uint32_t link, Ps time) { queue_.push(time, {kCredit | link, 0, link, 0, kNone, 0}); }

// What a node has read makes room at the end of the links by which it came.
void Engine::give_back_read(uint32_t number, uint32_t instance, Ps time) {
  const Node& node = program_.nodes[number];
  if (nbytes_of(node, instance) == 0) return;
  for (uint32_t i = node.incoming.first; i < node.incoming.first + node.incoming.count; ++i)
    give_back(route_of(program_.messages[i], instance).back(), time);
  for (uint32_t i = node.consumed.first; i < node.consumed.first + node.consumed.count; ++i) {
    const Edge& read = program_.consumed[i];
    give_back(route_of(program_.messages[read.target], instance_of(instance, read.turn)).back(), time);
  }
}

void Engine::credit(Ps now, uint32_t link) {
  --link_states_[link].taken;
  if (waiting_[link].empty()) return;
  const Event event = waiting_[link].front();
  waiting_[link].pop_front();
  ++link_states_[link].taken;
  serve(now, event, link);
}

// What follows from nodes that are done, without recursion: chains of free copies may be long.
void Engine::drain() {
  while (!done_.empty()) {
    const Done done = done_.back();
    done_.pop_back();
    const Node& node = program_.nodes[done.node];
    const auto finished = [&](int rank) {
      Ps& finish = outcome_.finish[static_cast<size_t>(rank)];
      finish = std::max(finish, done.time);
    };
    finished(rank_of(node.rank, done.instance));
    for (uint32_t i = node.exits.first; i < node.exits.first + node.exits.count; ++i) {
      const Edge& exit = program_.exits[i];
      finished(rank_of(static_cast<int32_t>(exit.target), instance_of(done.instance, exit.turn)));
    }
    for (uint32_t i = node.edges.first; i < node.edges.first + node.edges.count; ++i) {
      const Edge& edge = program_.edges[i];
      const uint32_t instance = instance_of(done.instance, edge.turn);
      State& waiting = state(edge.target, instance);
      raise(waiting, done.time, done.cause);
      if (--waiting.pending == 0) begin(edge.target, instance, waiting);
    }
    if (program_.copies == 1) {
      outcome_.arrivals[done.node] = done.time;
    } else if (--left_[done.node] == 0) {
      unused_.push_back(states_[done.node]);
      states_[done.node] = nullptr;
    }
  }
}

uint32_t Engine::record(TimedEvent::Kind kind, uint32_t index, const Node& node, Ps start, Ps end, uint64_t nbytes,
                        uint32_t cause) {
  outcome_.events.push_back({kind, index, node.round, cause, start, end, nbytes});
  return static_cast<uint32_t>(outcome_.events.size() - 1);
}

}  // namespace hxcomm::simulation
