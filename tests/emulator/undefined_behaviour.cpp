// What g++'s -fsanitize=alignment,bounds calls when a kernel makes a misaligned access or leaves an array. There is no
// runtime library of theirs: the launch ends with an Error. Misaligned accesses are errors on the card.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <string>

#include "emulator.h"

namespace {

// The compiler's descriptions, as far as they are used.
struct Location {
  const char* file;
  uint32_t line, column;
};
struct Mismatch {
  Location at;
  const void* type;
  unsigned char log_alignment;
};
struct OutOfBounds {
  Location at;
};

[[noreturn]] void stop(const Location& at, const std::string& what) {
  emulator::abandon(what + " at " + at.file + ":" + std::to_string(at.line));
}

}  // namespace

extern "C" [[noreturn]] void __ubsan_handle_type_mismatch_v1_abort(Mismatch* data, uintptr_t address) {
  stop(data->at, address == 0 ? "dereferences null"
                              : "accesses an address that is not a multiple of " +
                                    std::to_string(uint64_t(1) << data->log_alignment));
}

extern "C" [[noreturn]] void __ubsan_handle_out_of_bounds_abort(OutOfBounds* data, uintptr_t index) {
  stop(data->at, "uses index " + std::to_string(intptr_t(index)) + " of an array that does not have it");
}
