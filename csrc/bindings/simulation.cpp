// The simulator's engine for Python: programs are made of a Schedule's rounds as Python yields them, one at a time.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>

#include "bindings/runtime.h"
#include "simulation/engine.h"

namespace py = pybind11;

namespace hxcomm {
namespace {

using namespace simulation;

// A NamedTuple or list that nobody changes meanwhile; 8,190 rounds are read in 4 ms, by attribute it would be 40.
py::handle item(py::handle sequence, Py_ssize_t i) {
  if (!PyTuple_Check(sequence.ptr())) throw Malformed("not a Transfer, or not a Location");
  if (i >= PyTuple_GET_SIZE(sequence.ptr())) throw Malformed("too few values");
  return PyTuple_GET_ITEM(sequence.ptr(), i);
}

int32_t number(py::handle value) {
  const long read = PyLong_AsLong(value.ptr());
  if (read == -1 && PyErr_Occurred() != nullptr) {
    PyErr_Clear();
    throw Malformed("not a whole number");
  }
  if (read < INT32_MIN || read > INT32_MAX) throw Malformed("too large a number");
  return static_cast<int32_t>(read);
}

int32_t buffer_of(py::handle name) {
  const char* text = PyUnicode_Check(name.ptr()) ? PyUnicode_AsUTF8(name.ptr()) : nullptr;
  switch (text == nullptr ? '\0' : text[0]) {
    case 'i':
      return 0;
    case 'o':
      return 1;
    case 's':
      return 2;
    case 'm':
      return 3;
    default:
      throw Malformed("no such buffer");
  }
}

std::vector<At> locations(py::handle tuple) {
  std::vector<At> all;
  if (!PyTuple_Check(tuple.ptr())) throw Malformed("locations are no tuple");
  const Py_ssize_t size = PyTuple_GET_SIZE(tuple.ptr());
  all.reserve(static_cast<size_t>(size));
  for (Py_ssize_t i = 0; i < size; ++i) {
    const py::handle at = item(tuple, i);
    all.push_back({number(item(at, 0)), buffer_of(item(at, 1)), number(item(at, 2))});
  }
  return all;
}

std::vector<Transfer> transfers(py::handle round) {
  std::vector<Transfer> all;
  for (const py::handle each : round)
    all.push_back({number(item(each, 0)), PyObject_IsTrue(item(each, 3).ptr()) == 1, locations(item(each, 1)),
                   locations(item(each, 2))});
  return all;
}

// Of a rotation, rounds are Rotations; otherwise sequences of transfers.
Program program_from(const py::iterable& rounds, const Shape& shape) {
  Dataflow dataflow(shape);
  for (const py::handle round : rounds) {
    if (!shape.rotation) {
      dataflow.add_round(transfers(round), 0, 1);
      continue;
    }
    if (!py::hasattr(round, "rotated")) throw NotRotational("a round is no Rotation");
    uint32_t rotated = 0;
    for (const py::handle name : round.attr("rotated")) rotated |= 1u << buffer_of(name);
    const auto step = round.attr("step").cast<uint32_t>();
    dataflow.add_round(transfers(round.attr("transfers")), rotated, step);
  }
  return dataflow.finish();
}

py::object prepare(const py::iterable& rounds, int world_size, uint32_t pieces, bool in_place, bool rotation,
                   const std::vector<uint32_t>& chunks) {
  Shape shape;
  shape.world_size = world_size;
  shape.pieces = pieces;
  shape.in_place = in_place;
  shape.rotation = rotation;
  for (size_t i = 0; i < 4; ++i) shape.chunks[i] = chunks.at(i);
  try {
    return py::cast(std::make_shared<Program>(program_from(rounds, shape)));
  } catch (const NotRotational&) {
    return py::str("not rotational");
  } catch (const Overlap&) {
    return py::str("overlap");
  } catch (const Malformed& problem) {
    return py::str(std::string("malformed: ") + problem.what());
  }
}

using LinkValues = std::tuple<uint64_t, uint64_t, Ps, Ps, Ps, bool>;

std::vector<Link> links_from(const std::vector<LinkValues>& values) {
  std::vector<Link> links;
  links.reserve(values.size());
  for (const auto& [numerator, denominator, latency, per_message, tick, cut_through] : values)
    links.push_back({{numerator, denominator}, latency, per_message, tick, cut_through});
  return links;
}

py::tuple outcome_to(const Outcome& outcome) {
  py::list links, events, stuck;
  for (size_t i = 0; i < outcome.links.size(); ++i)
    links.append(py::make_tuple(outcome.links[i].nbytes, outcome.links[i].busy, outcome.links[i].messages));
  const char* kinds[] = {"link", "reduces", "copies"};
  for (const TimedEvent& each : outcome.events)
    events.append(py::make_tuple(kinds[each.kind], each.index, each.start, each.end, each.round, each.nbytes,
                                 each.predecessor == kNone ? -1 : static_cast<int64_t>(each.predecessor)));
  for (const Stuck& each : outcome.stuck) stuck.append(py::make_tuple(each.link, each.source, each.target, each.round));
  return py::make_tuple(py::tuple(py::cast(outcome.finish)), links, events, stuck);
}

void check_interrupt() {
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// A program on a network: kept, so that what depends on neither sizes nor starts is found out once.
class Simulation {
 public:
  Simulation(std::shared_ptr<Program> program, const std::vector<LinkValues>& links, py::function route)
      : program_(std::move(program)),
        links_(links_from(links)),
        routes_(program_->lanes, program_->world_size, program_->folded ? 1 : program_->world_size,
                [route = std::move(route)](int source, int target) {
                  const py::gil_scoped_acquire gil;
                  return route(source, target).cast<Route>();
                }) {}

  py::tuple run(std::vector<uint64_t> piece_bytes, std::vector<Ps> starts, std::pair<uint64_t, uint64_t> chip,
                uint32_t credits, bool record) {
    Settings settings;
    settings.piece_bytes = std::move(piece_bytes);
    settings.starts = std::move(starts);
    settings.chip = {chip.first, chip.second};
    settings.credits = credits;
    settings.record = record;
    settings.poll = check_interrupt;
    if (settings.piece_bytes.size() != program_->pieces ||
        settings.starts.size() != (program_->folded ? 1 : static_cast<size_t>(program_->world_size)))
      throw py::value_error("one size for each piece, and one start for each rank");
    Engine engine(*program_, links_, routes_, settings);
    Outcome outcome;
    {
      const py::gil_scoped_release nogil;
      outcome = engine.run();
    }
    return outcome_to(outcome);
  }

 private:
  std::shared_ptr<Program> program_;
  std::vector<Link> links_;
  Routes routes_;
};

std::vector<Ps> time_messages(const std::vector<LinkValues>& values, std::vector<uint64_t> nbytes,
                              std::vector<Ps> starts, const std::vector<Route>& routes) {
  const Program program = Program::of_messages(static_cast<uint32_t>(nbytes.size()));
  const std::vector<Link> links = links_from(values);
  Routes lanes(routes);
  Settings settings;
  settings.piece_bytes = std::move(nbytes);
  settings.starts = {0};
  settings.earliest = std::move(starts);
  return Engine(program, links, lanes, settings).run().arrivals;
}

}  // namespace

void bind_simulation(py::module_& m) {
  py::class_<Program, std::shared_ptr<Program>>(m, "SimulatedProgram",
                                                "A Schedule as the engine runs it (csrc/simulation/program.h).")
      .def_property_readonly("nodes", [](const Program& p) { return p.nodes.size(); })
      .def("fold", [](const Program& p) { return std::make_shared<Program>(p.fold()); });
  py::class_<Simulation>(m, "Simulation", "A program on the links of a network.")
      .def(py::init<std::shared_ptr<Program>, const std::vector<LinkValues>&, py::function>(), py::arg("program"),
           py::arg("links"), py::arg("route"))
      .def("run", &Simulation::run, py::kw_only(), py::arg("piece_bytes"), py::arg("starts"), py::arg("chip"),
           py::arg("credits") = 0, py::arg("record") = false,
           "(finish of each rank, (bytes, busy, messages) of each link, events, messages stuck).");
  m.def("prepare_simulation", &prepare, py::arg("rounds"), py::kw_only(), py::arg("world_size"), py::arg("pieces"),
        py::arg("in_place"), py::arg("rotation"), py::arg("chunks"),
        "A SimulatedProgram, or why there is none: 'not rotational', 'overlap', 'malformed: ...'.");
  m.def("time_messages", &time_messages, py::kw_only(), py::arg("links"), py::arg("nbytes"), py::arg("starts"),
        py::arg("routes"), "When each message has arrived.");
}

}  // namespace hxcomm
