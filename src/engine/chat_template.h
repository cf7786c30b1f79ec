// Writes messages in the form that a model was trained to answer. The forms of Qwen (ChatML),
// Llama 3 and Gemma are built in and chosen by the file's template; its Jinja text is not run.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "engine/gguf.h"
#include "engine/tokenizer.h"

namespace thriftattn {

// The role is "system", "user", "assistant" or "document". A document is put before the next
// user message, with an empty line between.
struct ChatMessage {
  std::string role;
  std::string content;
};

enum class ChatForm { plain, chatml, llama3, gemma };

// Text in pieces: a special piece is the name of one control token, the others are text in which
// no control token may be recognised, so that a document cannot end a turn.
struct ChatPiece {
  std::string text;
  bool special = false;
  // A document ends with this piece. It is encoded apart from the question behind it, so that its
  // tokens do not depend on what is asked.
  bool ends_document = false;
};

struct FormattedChat {
  ChatForm form = ChatForm::plain;
  std::vector<ChatPiece> pieces;
  bool parse_special = false;  // whether there are special pieces

  std::string text() const;  // all pieces
};

ChatForm detect_chat_form(const GgufFile& file);
std::string_view chat_form_name(ChatForm form);

// Plain form, for models without a template: "document\n\nQuestion: ...\nAnswer:".
FormattedChat format_chat(const GgufFile& file, const std::vector<ChatMessage>& messages,
                          bool add_generation_prompt);
FormattedChat format_chat(ChatForm form, const std::vector<ChatMessage>& messages,
                          bool add_generation_prompt, std::string_view default_system = {});

// What follows an answer of the model when the user goes on: the end of its turn, the next question
// and the beginning of the next answer.
FormattedChat format_next_turn(ChatForm form, std::string_view question);

// The tokens of a chat, with the beginning-of-text token if the model wants one and `begins`.
struct ChatTokens {
  std::vector<int32_t> tokens;
  size_t document = 0;  // of them, those up to the end of the (last) document; 0 = there is none
};
ChatTokens encode_chat_parts(const Tokenizer& tokenizer, const FormattedChat& chat,
                             bool begins = true);
std::vector<int32_t> encode_chat(const Tokenizer& tokenizer, const FormattedChat& chat);

}  // namespace thriftattn
