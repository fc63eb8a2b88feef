// A table's header whose columns sort it.

import { element, setAttribute } from "./dom.js";

export class SortableHead {
  /** A column is {key, title, of, direction of the first click, number?, fixed?}. */
  constructor(row, columns, onChange, first) {
    this.columns = columns;
    this.direction = first.direction;
    this.column = columns.find(({ key }) => key === first.key);
    this.onChange = onChange;
    row.append(...columns.map((column) => this.make(column)));
    this.row = row;
    this.mark();
  }

  make(column) {
    const cell = element("th", { scope: "col", class: column.number ? "number" : null });
    if (column.fixed) {
      cell.append(column.title);
      return cell;
    }
    const button = element("button", { type: "button" }, column.title);
    button.addEventListener("click", () => this.choose(column));
    cell.append(button);
    return cell;
  }

  choose(column) {
    this.direction = column === this.column ? -this.direction : column.direction;
    this.column = column;
    this.mark();
    this.onChange();
  }

  mark() {
    this.columns.forEach((column, at) => {
      const sorted = column === this.column ? (this.direction > 0 ? "ascending" : "descending") : null;
      setAttribute(this.row.children[at], "aria-sort", sorted);
    });
  }
}
