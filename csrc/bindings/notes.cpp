// The notes that processes leave each other, for Python.
#include <pybind11/stl.h>

#include <optional>

#include "bindings/runtime.h"
#include "core/notes.h"

namespace py = pybind11;

namespace hxcomm {
namespace {

Note& note_at(std::byte* base, size_t nbytes, uint64_t offset, size_t index) {
  if (offset % 4096 != 0 || offset > nbytes || nbytes - offset < sizeof(NotePage) || index >= NotePage::kNotes)
    throw Error(ErrorKind::init, "no note " + std::to_string(index) + " at byte " + std::to_string(offset) +
                                     " of a segment of " + std::to_string(nbytes));
  return reinterpret_cast<NotePage*>(base + offset)->notes[index];
}

}  // namespace

void bind_notes(py::class_<Runtime, std::shared_ptr<Runtime>>& runtime) {
  // A process of this host, for as long as somebody holds it.
  py::class_<Peer, std::shared_ptr<Peer>>(runtime, "Neighbour")
      .def_property_readonly(
          "death",
          [](const Peer& peer) { return peer.dead.load(std::memory_order_acquire) ? peer.death : std::string(); })
      .def(
          "read_note",
          [](const Peer& peer, uint64_t offset, size_t index) {
            Note& note = note_at(peer.mapping->base(), peer.mapping->nbytes(), offset, index);
            const uint64_t about = note.tag.about();
            return py::make_tuple(about, py::bytes(note.read(about)));
          },
          py::arg("offset"), py::arg("index"));
  runtime
      .def(
          "neighbour",
          [](const Runtime& r, const std::string& address, const std::string& nonce,
             int timeout_ms) -> std::shared_ptr<Peer> {
            const Nonce expected = nonce_from(nonce);
            const py::gil_scoped_release nogil;
            try {
              return r.endpoint->connect(address, expected, timeout_ms);
            } catch (const NobodyThere&) {
              return nullptr;
            }
          },
          py::arg("address"), py::arg("nonce"), py::arg("timeout_ms"),
          "The process of this host that listens there, mapped; None where nobody does.")
      .def(
          "allocate_notes", [](const Runtime& r) { return r.endpoint->segment().allocate(sizeof(NotePage)); },
          "A page of notes, all empty; its offset in the segment.")
      .def(
          "write_note",
          [](const Runtime& r, uint64_t offset, size_t index, uint64_t about, const std::string& text) {
            if (text.size() > Note::kTextBytes)
              throw Error(ErrorKind::init, "a note of " + std::to_string(text.size()) + " bytes; at most " +
                                               std::to_string(Note::kTextBytes) + " fit");
            Segment& segment = r.endpoint->segment();
            note_at(segment.base(), segment.control_bytes(), offset, index).write(about, text);
          },
          py::arg("offset"), py::arg("index"), py::arg("about"), py::arg("text"))
      .def(
          "release_notes",
          [](const Runtime& r, uint64_t offset) { r.endpoint->segment().release(offset, sizeof(NotePage)); },
          py::arg("offset"));
}

}  // namespace hxcomm
