// The connections to other hosts, for Python.
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "bindings/runtime.h"

namespace py = pybind11;

namespace hxcomm {

Nonce nonce_from(const std::string& bytes) {
  Nonce nonce;
  if (bytes.size() != nonce.size())
    throw Error(ErrorKind::init, "a process's nonce has 16 bytes, not " + std::to_string(bytes.size()));
  std::memcpy(nonce.data(), bytes.data(), nonce.size());
  return nonce;
}

namespace {

std::array<uint8_t, 32> key_from(const std::string& bytes) {
  std::array<uint8_t, 32> key{};
  if (!bytes.empty() && bytes.size() != key.size())
    throw Error(ErrorKind::usage, "a key has 32 bytes, not " + std::to_string(bytes.size()));
  std::copy(bytes.begin(), bytes.end(), key.begin());
  return key;
}

Wire& wire_of(const Runtime& runtime) {
  if (Wire* wire = runtime.endpoint->wire(); wire != nullptr) return *wire;
  throw Error(ErrorKind::usage, "open_wire() has not been called");
}

}  // namespace

void bind_wire(py::class_<Runtime, std::shared_ptr<Runtime>>& runtime) {
  runtime
      .def(
          "open_wire",
          [](const Runtime& r, const std::string& bind_address, const std::string& mode,
             const std::string& server_secret, const std::string& server_public, const std::string& client_secret,
             const std::string& client_public, const std::string& mac_key) {
            WireSecurity security{};
            if (mode != "none" && mode != "curve" && mode != "mac")
              throw Error(ErrorKind::usage, "the security of connections is none, curve or mac, not " + mode);
            security.mode = mode == "curve" ? WireSecurity::Mode::curve
                            : mode == "mac" ? WireSecurity::Mode::mac
                                            : WireSecurity::Mode::none;
            security.server_secret = key_from(server_secret);
            security.server_public = key_from(server_public);
            security.client_secret = key_from(client_secret);
            security.client_public = key_from(client_public);
            security.mac_key = key_from(mac_key);
            const py::gil_scoped_release nogil;
            return r.endpoint->open_wire(bind_address, security).address();
          },
          py::arg("bind_address"), py::kw_only(), py::arg("mode") = "none", py::arg("server_secret") = py::bytes(),
          py::arg("server_public") = py::bytes(), py::arg("client_secret") = py::bytes(),
          py::arg("client_public") = py::bytes(), py::arg("mac_key") = py::bytes(),
          "Binds a port for ranks of other hosts, once a process, and returns its address.")
      .def(
          "connect_wire",
          [](const Runtime& r, const std::string& process, const std::string& address) {
            wire_of(r).connect(nonce_from(process), address);
          },
          py::arg("process"), py::arg("address"))
      .def(
          "is_wired",
          [](const Runtime& r, const std::string& process) {
            const py::gil_scoped_release nogil;
            r.endpoint->pump_wire();
            return wire_of(r).is_connected(nonce_from(process));
          },
          py::arg("process"), "Whether the connection with this process of another host stands.")
      .def(
          "wire_trouble",
          [](const Runtime& r, const std::string& process) { return wire_of(r).trouble_of(nonce_from(process)); },
          py::arg("process"), "Why it does not, as far as is known.")
      .def("close_wire", [](const Runtime& r) {
        const py::gil_scoped_release nogil;
        r.endpoint->close_wire();
      });
}

}  // namespace hxcomm
