// What README.md tells people to type and to compile is what there is.
#include <gtest/gtest.h>

#include <sstream>
#include <string>
#include <vector>

#include "cli/command.h"

namespace thriftattn::test {
namespace {

const std::string kRoot = THRIFTATTN_SOURCE_DIR;

// The lines of the code blocks of a language; continued lines are joined.
std::vector<std::string> block_lines(const std::string& file, const std::string& language) {
  std::istringstream text(Sandbox::read(kRoot + "/" + file));
  std::vector<std::string> lines;
  bool inside = false, joined = false;
  for (std::string line; std::getline(text, line);) {
    if (line.starts_with("```")) {
      inside = line == "```" + language;
      continue;
    }
    if (!inside) continue;
    const bool more = line.ends_with('\\');
    if (more) line.pop_back();
    if (joined) {
      lines.back() += line;
    } else {
      lines.push_back(line);
    }
    joined = more;
  }
  return lines;
}

std::string trimmed(const std::string& line) {
  const size_t first = line.find_first_not_of(' ');
  return first == std::string::npos ? "" : line.substr(first);
}

// Words as a shell splits them; double and single quotes only.
std::vector<std::string> words(const std::string& line) {
  std::vector<std::string> all;
  char quote = 0;
  bool in_word = false;
  for (const char c : line) {
    if (quote != 0 ? c == quote : c == '"' || c == '\'') {
      quote = quote != 0 ? 0 : c;
    } else if (quote == 0 && c == ' ') {
      in_word = false;
    } else {
      if (!in_word) all.emplace_back();
      in_word = true;
      all.back() += c;
    }
  }
  return all;
}

// A command line that is understood but names a model that is not there ends with 1; one that is
// not understood with 2.
TEST(Readme, CommandLinesAreUnderstood) {
  int tried = 0;
  for (const char* file : {"README.md", "docs/eval.md", "docs/run.md"}) {
    for (const std::string& line : block_lines(file, "sh")) {
      std::vector<std::string> all = words(line);
      if (all.empty() || !all[0].ends_with("thriftattn")) continue;
      all.erase(all.begin());
      for (size_t i = 0; i + 1 < all.size(); ++i) {
        if (all[i] == "-m") all[i + 1] = "/no/such/model.gguf";
      }
      const Outcome r = Sandbox().run(all);
      EXPECT_EQ(r.code, 1) << line << "\n" << r.err;
      ++tried;
    }
  }
  EXPECT_GE(tried, 3);
}

TEST(Readme, TheLibraryExampleIsInTheExample) {
  std::vector<std::string> code;
  for (const std::string& line : block_lines("README.md", "cpp")) {
    if (!trimmed(line).empty()) code.push_back(trimmed(line));
  }
  ASSERT_GT(code.size(), 10u);
  size_t next = 0;
  std::istringstream example(Sandbox::read(kRoot + "/examples/minimal/main.cc"));
  for (std::string line; next < code.size() && std::getline(example, line);) {
    if (trimmed(line) == code[next]) ++next;
  }
  EXPECT_EQ(next, code.size()) << "examples/minimal/main.cc lacks, or has elsewhere: "
                               << (next < code.size() ? code[next] : "");
}

TEST(Readme, PresetsAreAllNamed) {
  const std::string readme = Sandbox::read(kRoot + "/README.md");
  std::istringstream names(Sandbox().run({"policies"}).out);
  int count = 0;
  for (std::string line; std::getline(names, line);) {
    if (line.empty() || line[0] == ' ') continue;
    EXPECT_NE(readme.find("`" + line + "`"), std::string::npos) << line;
    ++count;
  }
  EXPECT_GE(count, 9);
}

}  // namespace
}  // namespace thriftattn::test
