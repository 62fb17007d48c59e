// C functions for ctypes: they return null, or what went wrong.
#pragma once

#include <exception>
#include <string>

#include "launch.cuh"

#define ENGM_EXPORT extern "C" __attribute__((visibility("default")))

namespace exported {

// Launches; the message of an error, or "launch returned <code>".
template <typename Argument>
const char* run(void (*kernel)(Argument), int64_t blocks, int threads, int64_t shared, const Argument& argument) {
  static std::string message;
  try {
    const int code = engm::cuda::launch(kernel, blocks, threads, shared, nullptr, argument);
    if (code == 0) return nullptr;
    message = "launch returned " + std::to_string(code);
  } catch (const std::exception& error) {
    message = error.what();
  }
  return message.c_str();
}

}  // namespace exported
