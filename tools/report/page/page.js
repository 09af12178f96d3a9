// Draws the report: Report.draw(DATA), again with new data as often as a live page wants.
"use strict";
